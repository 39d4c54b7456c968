"""What an op that chooses tokens tells of their distributions besides: best tokens and ranks.

Knows nothing of requests or of how a token is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Best tokens that a row may ask for of ops that choose: they are found one after the other.
MOST_LISTED = 20


class BestTokens(NamedTuple):
    """Takes the best tokens of rows, before any edit, temperature or narrowing.

    Attributes:
        asked: [rows] int32: how many of its best tokens a row lists, at most ``most``; -1 for a row
            that tells nothing, not even a rank.
        ids: [rows, most] int64 that is overwritten, best first, of equals the lowest ids first;
            what stands behind those asked for means nothing.
        log_probs: [rows, most] float32 that is overwritten with their log-probabilities.
        ranks: [rows] int64 that is overwritten: 1 + the number of tokens that are more likely than
            the chosen one.
    """

    asked: Tensor
    ids: Tensor
    log_probs: Tensor
    ranks: Tensor

    def rows(self, index: Tensor | slice) -> BestTokens:
        """Those of some rows; of a slice they take what is written in the same memory."""
        return BestTokens(*(column[index] for column in self))

    def put(self, index: Tensor, part: BestTokens) -> None:
        """Take what ``part`` was told of the rows ``index``."""
        for column, own in zip(self[1:], part[1:], strict=True):
            column[index] = own


def tell_best(best: BestTokens, log_probs: Tensor, tokens: Tensor) -> None:
    """Fill ``best`` from [rows, vocab] log-probabilities and the [rows] chosen tokens.

    Every row is told in full, whatever it asked for.
    """
    chosen = log_probs.gather(1, tokens[:, None])
    count = min(best.ids.shape[1], log_probs.shape[1])
    ordered = log_probs.sort(dim=-1, descending=True, stable=True)
    best.ids[:, :count] = ordered.indices[:, :count]
    best.log_probs[:, :count] = ordered.values[:, :count]
    best.ranks.copy_((log_probs > chosen).sum(-1) + 1)


def no_best_tokens(asked: Tensor, most: int) -> BestTokens:
    """Memory for rows that ask for up to ``most`` tokens."""
    shape, device = (asked.shape[0], most), asked.device
    return BestTokens(
        asked,
        torch.zeros(shape, dtype=torch.int64, device=device),
        torch.zeros(shape, dtype=torch.float32, device=device),
        torch.ones(shape[0], dtype=torch.int64, device=device),
    )
