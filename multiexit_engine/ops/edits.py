"""What requests ask of scores before a token is chosen, as tensors that kernels can read by tile.

Knows nothing of requests, nor of why a token is favoured, penalised or forbidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32


class TokenEdits(NamedTuple):
    """Changes of scores: of listed tokens by numbers, of all others not at all.

    A listed token's score s becomes ``s + bias``, is then divided by ``penalty`` where it is
    positive or 0 and multiplied where it is negative, and loses ``loss``; an infinite loss forbids
    the token. Tokens that are not allowed are forbidden whatever their score.

    Attributes:
        rows: [edits] int64, ascending.
        tokens: [edits] int64, ascending within a row, each once.
        bias: [edits] float32.
        penalty: [edits] float32, 1 for none.
        loss: [edits] float32.
        allowed: [rows, ceil(vocab / 32)] int32: bit t % 32 of word t // 32 is token t; None where
            every row allows all.
        edited: [rows] int32: 1 for each row with an edit, or with tokens that are not allowed.
    """

    rows: Tensor
    tokens: Tensor
    bias: Tensor
    penalty: Tensor
    loss: Tensor
    allowed: Tensor | None
    edited: Tensor


def edited_scores(scores: Tensor, edits: TokenEdits) -> Tensor:
    """[rows, vocab] scores after the edits, in a tensor of their own.

    Args:
        scores: [rows, vocab]; left as they are.
        edits: of these rows.

    Source: transformers' ``RepetitionPenaltyLogitsProcessor`` for the penalty; the presence and
        frequency penalties of vLLM for the loss.
    """
    scores = scores.clone()
    places = edits.rows, edits.tokens
    found = scores[places] + edits.bias
    found = torch.where(found < 0, found * edits.penalty, found / edits.penalty)
    scores[places] = torch.where(edits.loss == math.inf, -math.inf, found - edits.loss)
    if edits.allowed is not None:
        scores.masked_fill_(~allowed_tokens(edits.allowed, scores.shape[1]), -math.inf)
    return scores


def allowed_tokens(words: Tensor, vocab_size: int) -> Tensor:
    """[rows, vocab_size] bool of [rows, words] int32 bits."""
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return (words[..., None] >> places & 1).flatten(1)[:, :vocab_size].bool()
