"""Which tokens may be sampled, in tensors of one number for each row: top-k, top-p, min-p.

Knows nothing of requests, of temperatures or of how a token is drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Narrowing(NamedTuple):
    """What narrows the rows of an op that chooses tokens; greedy rows are not narrowed.

    Attributes:
        top_k: [rows] int32: the row's so many best tokens stay, and those that tie with the last of
            them; 0 for all.
        unlikely: [rows] float32, 1 - top_p: of what top_k left, the least likely tokens go that
            hold no more than this much probability together, of equals the lowest ids first; the
            best token stays. Below 0 for none.
        min_p: [rows] float32: of what is left, tokens go that are less than so likely as the best,
            0 for none.
    """

    top_k: Tensor
    unlikely: Tensor
    min_p: Tensor

    def rows(self, part: Tensor | slice) -> Narrowing:
        """That of some rows."""
        return Narrowing(*(column[part] for column in self))


def narrowed_scores(scores: Tensor, narrowing: Narrowing) -> Tensor:
    """[rows, vocab] scores, divided by the temperature, with -inf where a token may not come.

    Source: transformers' TopK-, TopP- and MinPLogitsWarper, in this order.
    """
    best = scores.sort(-1, descending=True).values
    scores = keep_top_k(scores, best, narrowing.top_k)
    scores = keep_top_p(scores, narrowing.unlikely)
    return keep_min_p(scores, narrowing.min_p)


def keep_top_k(scores: Tensor, best: Tensor, top_k: Tensor) -> Tensor:
    """Apply top_k to [rows, vocab] scores whose [rows, n] largest ones, in order, are ``best``.

    Rows that ask for 0 tokens, or for the whole vocabulary, stay; others ask for n at most.
    """
    is_off = (top_k <= 0) | (top_k >= scores.shape[1])
    last = (top_k.long() - 1).clamp(0, best.shape[1] - 1)
    threshold = best.gather(1, last[:, None]).masked_fill(is_off[:, None], -math.inf)
    return scores.masked_fill(scores < threshold, -math.inf)


def keep_top_p(scores: Tensor, unlikely: Tensor) -> Tensor:
    """Apply [rows] ``Narrowing.unlikely`` to [rows, vocab] scores."""
    ascending = scores.sort(dim=-1, stable=True)
    is_out = ascending.values.softmax(-1).cumsum(-1) <= unlikely[:, None]
    is_out[:, -1] = False
    return scores.masked_fill(is_out.scatter(1, ascending.indices, is_out), -math.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Apply [rows] min_p to [rows, vocab] scores."""
    probs = scores.softmax(-1)
    least = min_p[:, None] * probs.amax(-1, keepdim=True)
    return scores.masked_fill(probs < least, -math.inf)
