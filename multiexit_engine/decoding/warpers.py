"""Narrows score rows to the tokens that may be sampled: temperature, top-k, top-p, min-p, typical.

Knows sampling parameters only. Rows with different parameters are narrowed together, and no row's
result depends on another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.params import SamplingParams
from multiexit_engine.transfer import to_device

# Room for tokens that tie with the k-th best, which top_k keeps.
TIES = 64


def warp_scores(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Divide by the temperature, then set to -inf what may not be sampled.

    Args:
        scores: [rows, vocab] float32 processed scores; left as they are.
        params: one for each row, with a temperature above 0.

    Returns:
        [rows, vocab] float32 scores.

    Source: transformers' Temperature-, TopK-, TopP-, MinP- and TypicalLogitsWarper, in this order.
    """
    scores = scores / _column([p.temperature for p in params], scores)
    scores = _keep_top_k(scores, [p.top_k for p in params])
    by_width: dict[int, list[int]] = {}
    for index, param in enumerate(params):
        if param.top_p < 1 or param.min_p > 0 or param.typical_p < 1:
            by_width.setdefault(_width(param.top_k, scores.shape[1]), []).append(index)
    for width, indices in by_width.items():
        places = to_device(indices, scores.device)
        chosen = [params[index] for index in indices]
        scores[places] = _keep_by_mass(scores[places], chosen, width)
    return scores


def is_warped(params: SamplingParams) -> bool:
    """Whether ``warp_scores`` does more than to divide by the temperature."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1


def _column(numbers: list[float], like: Tensor) -> Tensor:
    """[rows, 1] of one number for each row."""
    return to_device(numbers, like.device, like.dtype)[:, None]


def _keep_top_k(scores: Tensor, top_k: list[int]) -> Tensor:
    vocab = scores.shape[1]
    largest = max((k for k in top_k if k < vocab), default=0)
    if largest == 0:
        return scores
    best = scores.topk(largest, -1).values
    last = to_device([min(k, largest) - 1 if k else 0 for k in top_k], scores.device)[:, None]
    threshold = best.gather(1, last)
    is_off = [k == 0 or k >= vocab for k in top_k]
    if any(is_off):
        column = to_device(is_off, scores.device)[:, None]
        threshold = threshold.masked_fill(column, -math.inf)
    return scores.masked_fill(scores < threshold, -math.inf)


def _width(top_k: int, vocab: int) -> int:
    """Places for all tokens that top_k leaves, ties included.

    Depends on the row's own parameters only, so that sums are rounded alike in any batch.
    """
    return min(top_k + TIES, vocab) if top_k else vocab


def _keep_by_mass(scores: Tensor, params: list[SamplingParams], width: int) -> Tensor:
    """The filters that look at probabilities, on rows with about ``width`` tokens left at most.

    They sort. On the CPU a row of 50257 takes 3.3 ms to sort, so only what top_k left is looked at
    there, and the rest only where more tokens tie than there is room for.
    """
    if width == scores.shape[1] or scores.device.type != "cpu":
        return _filter_by_mass(scores, params)
    best = scores.topk(width, -1)
    ids = best.indices.sort(-1).values
    kept = torch.full_like(scores, -math.inf)
    kept.scatter_(1, ids, _filter_by_mass(scores.gather(1, ids), params))
    overflows = best.values[:, -1:] > -math.inf
    if overflows.any():
        kept = torch.where(overflows, _filter_by_mass(scores, params), kept)
    return kept


def _filter_by_mass(scores: Tensor, params: list[SamplingParams]) -> Tensor:
    if any(p.top_p < 1 for p in params):
        scores = _keep_top_p(scores, [p.top_p for p in params])
    if any(p.min_p > 0 for p in params):
        probs = scores.softmax(-1)
        least = _column([p.min_p for p in params], scores) * probs.amax(-1, keepdim=True)
        scores = scores.masked_fill(probs < least, -math.inf)
    if any(p.typical_p < 1 for p in params):
        scores = _keep_typical(scores, [p.typical_p for p in params])
    return scores


def _keep_top_p(scores: Tensor, top_p: list[float]) -> Tensor:
    ascending = scores.sort(dim=-1, stable=True)
    # A row without top_p gets a threshold that no sum of probabilities is below.
    unlikely = _column([1 - p if p < 1 else -1.0 for p in top_p], scores)
    is_out = ascending.values.softmax(-1).cumsum(-1) <= unlikely
    is_out[:, -1] = False
    return scores.masked_fill(is_out.scatter(1, ascending.indices, is_out), -math.inf)


def _keep_typical(scores: Tensor, typical_p: list[float]) -> Tensor:
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    by_distance = (-logprobs - entropy).abs().sort(dim=-1, stable=True)
    mass = scores.gather(1, by_distance.indices).softmax(-1).cumsum(-1)
    # A row without typical_p never reaches the mass it asks for and keeps every distance.
    asked = _column([p if p < 1 else math.inf for p in typical_p], scores)
    last = (mass < asked).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    is_out = by_distance.values > by_distance.values.gather(1, last)
    is_out[:, 0] = False
    return scores.masked_fill(is_out.scatter(1, by_distance.indices, is_out), -math.inf)
