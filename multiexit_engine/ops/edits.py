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
        rows: [edits] int64 in any order; the number of rows for an edit that does nothing.
        tokens: [edits] int64, each once in a row.
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


class EditTable(NamedTuple):
    """The same by token, as kernels read it that go through a vocabulary in tiles.

    Attributes:
        edited: [rows, ceil(vocab / 32)] int32: the bit of each token with numbers, as ``allowed``.
        entries: [rows, vocab] int32: where a token's numbers stand, if it has any; else anything.
        allowed: as in ``TokenEdits``, all bits set in rows that allow all.
        is_edited: [rows] int32, ``TokenEdits.edited``.
        bias: [numbers] float32.
        penalty: [numbers] float32.
        loss: [numbers] float32.
    """

    edited: Tensor
    entries: Tensor
    allowed: Tensor
    is_edited: Tensor
    bias: Tensor
    penalty: Tensor
    loss: Tensor


Edits = TokenEdits | EditTable


def edited_scores(scores: Tensor, edits: Edits) -> Tensor:
    """[rows, vocab] scores after the edits, in a tensor of their own.

    Args:
        scores: [rows, vocab]; left as they are.
        edits: of these rows.

    Source: transformers' ``RepetitionPenaltyLogitsProcessor`` for the penalty; the presence and
        frequency penalties of vLLM for the loss.
    """
    if not isinstance(edits, TokenEdits):
        return _edited_by_table(scores, EditTable(*edits))
    num_rows = scores.shape[0]
    # what does nothing is done to a row that nobody looks at
    scores = torch.cat([scores, scores.new_zeros(1, scores.shape[1])])
    places = edits.rows, edits.tokens
    scores[places] = _edited(scores[places], edits.bias, edits.penalty, edits.loss)
    scores = scores[:num_rows]
    if edits.allowed is not None:
        scores.masked_fill_(~allowed_tokens(edits.allowed, scores.shape[1]), -math.inf)
    return scores


def _edited(scores: Tensor, bias: Tensor, penalty: Tensor, loss: Tensor) -> Tensor:
    found = scores + bias
    found = torch.where(found < 0, found * penalty, found / penalty)
    return torch.where(loss == math.inf, -math.inf, found - loss)


def _edited_by_table(scores: Tensor, table: EditTable) -> Tensor:
    has_numbers = allowed_tokens(table.edited, scores.shape[1])
    # what stands for other tokens is no number of theirs, nor a place that there is
    places = torch.where(has_numbers, table.entries, 0).long()
    edited = _edited(scores, table.bias[places], table.penalty[places], table.loss[places])
    scores = torch.where(has_numbers, edited.to(scores.dtype), scores)
    return scores.masked_fill_(~allowed_tokens(table.allowed, scores.shape[1]), -math.inf)


class LatestTokens(NamedTuple):
    """Tokens that the edits of rows do not know of yet, and what one more token changes.

    Attributes:
        tokens: [rows] int64: what stands last in the row's text; -1 where the edits know it.
        penalty: [rows] float32 of a token that the text contains.
        loss: [rows] float32 of a token that stands in the text for the first time.
        more: [edits] float32: what an edit's token loses besides if it is the last one.
    """

    tokens: Tensor
    penalty: Tensor
    loss: Tensor
    more: Tensor


def with_latest(edits: TokenEdits, latest: LatestTokens) -> TokenEdits:
    """The edits of texts that are one token longer; shapes depend on shapes alone.

    Args:
        edits: [edits] of texts without their last tokens.
        latest: these tokens.

    Returns:
        [edits + rows] edits: those of tokens that were edited are changed, others are added.
    """
    num_rows, device = latest.tokens.shape[0], latest.tokens.device
    is_late = edits.tokens == _of_rows(latest.tokens, edits.rows, -1)
    is_known = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    is_known.index_add_(0, edits.rows, is_late.int())
    is_new = (latest.tokens >= 0) & (is_known[:num_rows] == 0)
    is_new &= (latest.penalty != 1) | (latest.loss != 0)
    own = torch.where(is_new, torch.arange(num_rows, device=device), num_rows)
    penalty = torch.where(is_late, _of_rows(latest.penalty, edits.rows, 1.0), edits.penalty)
    return TokenEdits(
        torch.cat([edits.rows, own]),
        torch.cat([edits.tokens, latest.tokens.clamp(min=0)]),
        torch.cat([edits.bias, torch.zeros_like(latest.loss)]),
        torch.cat([penalty, latest.penalty]),
        torch.cat([edits.loss + torch.where(is_late, latest.more, 0.0), latest.loss]),
        edits.allowed,
        edits.edited | is_new,
    )


def _of_rows(values: Tensor, rows: Tensor, otherwise: float) -> Tensor:
    """[edits] of [rows] values, ``otherwise`` for edits that do nothing."""
    return torch.nn.functional.pad(values, (0, 1), value=otherwise)[rows]


def allowed_tokens(words: Tensor, vocab_size: int) -> Tensor:
    """[rows, vocab_size] bool of [rows, words] int32 bits."""
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return (words[..., None] >> places & 1).flatten(1)[:, :vocab_size].bool()
