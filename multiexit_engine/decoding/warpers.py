"""Narrows score rows to the tokens that may be sampled: temperature, top-k, top-p, min-p, typical.

Knows sampling parameters only. Rows with different parameters are narrowed together, and no row's
result depends on another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.ops.narrowing import Narrowing, keep_min_p, keep_top_k, keep_top_p
from multiexit_engine.params import SamplingParams
from multiexit_engine.transfer import to_device

# Room for tokens that tie with the k-th best, which top_k keeps.
TIES = 64
# a row of a ``Narrowing`` that keeps all tokens
NOT_NARROWED = (0, -1.0, 0.0)


def warp_scores(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Divide by the temperature, then set to -inf what may not be sampled.

    Args:
        scores: [rows, vocab] float32 processed scores; left as they are.
        params: one for each row, with a temperature above 0.

    Returns:
        [rows, vocab] float32 scores.

    Source: transformers' Temperature-, TopK-, TopP-, MinP- and TypicalLogitsWarper, in this order.
    """
    scores = scores / _column([p.temperature for p in params], scores)[:, None]
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


def narrowing_of(params: Sequence[SamplingParams], device: torch.device) -> Narrowing | None:
    """What ``warp_scores`` does to rows beside temperature and typical_p, for ops that choose.

    None where no row asks for anything; rows that are greedy ask for nothing.
    """
    asked = [narrowing_row(own) for own in params]
    if all(row == NOT_NARROWED for row in asked):
        return None
    top_k, unlikely, min_p = zip(*asked, strict=True)
    return Narrowing(
        to_device(top_k, device, torch.int32),
        to_device(unlikely, device, torch.float32),
        to_device(min_p, device, torch.float32),
    )


def narrowing_row(params: SamplingParams) -> tuple[int, float, float]:
    """The numbers of one row of a ``Narrowing``."""
    if params.is_greedy:
        return NOT_NARROWED
    return params.top_k, _unlikely(params), params.min_p


def _column(numbers: list[float], like: Tensor) -> Tensor:
    """[rows] of one number for each row."""
    return to_device(numbers, like.device, like.dtype)


def _keep_top_k(scores: Tensor, top_k: list[int]) -> Tensor:
    vocab = scores.shape[1]
    largest = max((k for k in top_k if k < vocab), default=0)
    if largest == 0:
        return scores
    best = scores.topk(largest, -1).values
    return keep_top_k(scores, best, to_device(top_k, scores.device))


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
        scores = keep_top_p(scores, _column([_unlikely(p) for p in params], scores))
    if any(p.min_p > 0 for p in params):
        scores = keep_min_p(scores, _column([p.min_p for p in params], scores))
    if any(p.typical_p < 1 for p in params):
        scores = _keep_typical(scores, [p.typical_p for p in params])
    return scores


def _unlikely(params: SamplingParams) -> float:
    """See ``Narrowing``: without top_p a threshold that no sum of probabilities is below."""
    return 1 - params.top_p if params.top_p < 1 else NOT_NARROWED[1]


def _keep_typical(scores: Tensor, typical_p: list[float]) -> Tensor:
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    by_distance = (-logprobs - entropy).abs().sort(dim=-1, stable=True)
    mass = scores.gather(1, by_distance.indices).softmax(-1).cumsum(-1)
    # A row without typical_p never reaches the mass it asks for and keeps every distance.
    asked = _column([p if p < 1 else math.inf for p in typical_p], scores)[:, None]
    last = (mass < asked).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    is_out = by_distance.values > by_distance.values.gather(1, last)
    is_out[:, 0] = False
    return scores.masked_fill(is_out.scatter(1, by_distance.indices, is_out), -math.inf)
