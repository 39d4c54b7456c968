"""Continuations under a few decoding modes, to look at and to count repetition in.

For a model card, not for serving: it computes every exit in every mode. It knows networks and
token ids; it does not know tokenizers or the engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from multiexit_engine.train.exits import MultiExitNetwork
from multiexit_engine.train.measure import contrast_log_probs

Scores = Callable[[dict[int, Tensor]], Tensor]


def exit_scores(layer: int) -> Scores:
    """The logits of one exit."""
    return lambda logits: logits[layer]


def contrast_scores(upper: int, lower: int, alpha: float = 0.1) -> Scores:
    """The contrasted log-probabilities of two exits."""
    return lambda logits: contrast_log_probs(logits[upper], logits[lower], alpha)


@torch.no_grad()
def greedy_continuations(
    network: MultiExitNetwork, prompts: Tensor, scores: Scores, num_tokens: int
) -> Tensor:
    """Prompts [rows, tokens] with their `num_tokens` most probable next tokens appended."""
    pieces, cache = [prompts], DynamicCache()
    for _ in range(num_tokens):
        logits = network.next_logits(pieces[-1], cache)
        pieces.append(scores(logits).argmax(dim=-1, keepdim=True))
    return torch.cat(pieces, dim=1)


def repetition(continuations: Tensor, n: int = 3) -> float:
    """Mean share of n-grams of a row that occurred before in the row; 0 is no repetition."""
    shares = []
    for row in continuations.tolist():
        ngrams = [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]
        shares.append(1.0 - len(set(ngrams)) / len(ngrams))
    return sum(shares) / len(shares)
