"""DoLa from logits: how far earlier layers are from the last one, and the token of the difference.

A program has a part of the vocabulary of one row; parts are joined in their order. Knows nothing
of heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.head_lists import first_best
from multiexit_engine.kernels.launch import options
from multiexit_engine.kernels.noise import gumbel

BLOCK = 2048  # tokens of a part
WARPS = 8
_MOST = tl.constexpr(3.4028234663852886e38)  # what +inf counts as
_LEAST = tl.constexpr(1.2e-38)
_NO_TOKEN = tl.constexpr(2147483647)


def js_divergences(mature: Tensor, premature: Tensor, form: str) -> Tensor:
    """See ``multiexit_engine.ops.dola``. Two launches and a sum."""
    mature, premature = mature.float().contiguous(), premature.float().contiguous()
    sums = _divergence_parts(mature, premature, _softmax_parts(mature, premature), form).sum(-1)
    return sums * (0.5 / mature.shape[1] if form == "reference" else 0.5)


def dola_tokens(
    mature: Tensor,
    premature: Tensor,
    relative_top: Tensor,
    form: str,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.dola``. Four launches, three with a single candidate."""
    mature, premature = mature.float().contiguous(), premature.float().contiguous()
    (rows, vocab), device = mature.shape, mature.device
    softmax = _softmax_parts(mature, premature)
    divergences = None
    if len(premature) > 1:
        divergences = _divergence_parts(mature, premature, softmax, form)
    num_parts = softmax.shape[-1]
    numbers = torch.empty(4, rows, num_parts, dtype=torch.float32, device=device)
    best = torch.empty(rows, num_parts, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    log_probs = torch.empty(rows, dtype=torch.float32, device=device)
    parts = triton.next_power_of_2(num_parts)
    score_kernel[rows, num_parts](
        mature, premature, softmax, divergences, relative_top.float().contiguous(),
        temperature.float().contiguous(), seeds.contiguous(), positions.contiguous(),
        numbers, best, places, len(premature), vocab,
        COMPARED=divergences is not None, PARTS=parts, BLOCK=BLOCK, **options(WARPS),
    )  # fmt: skip
    join_kernel[(rows,)](
        numbers, best, tokens, log_probs, num_parts, vocab, PARTS=parts, **options(4)
    )
    return tokens, log_probs


def _softmax_parts(mature: Tensor, premature: Tensor) -> Tensor:
    """[2, (1 + candidates) * rows, parts]: the largest logit, and the sum of exp(x - largest)."""
    rows, vocab = mature.shape
    shape = 2, rows + premature.shape[0] * rows, triton.cdiv(vocab, BLOCK)
    parts = torch.empty(shape, dtype=torch.float32, device=mature.device)
    softmax_kernel[shape[1:]](mature, premature, parts, rows, vocab, BLOCK=BLOCK, **options(WARPS))
    return parts


def _divergence_parts(mature: Tensor, premature: Tensor, softmax: Tensor, form: str) -> Tensor:
    """[candidates, rows, parts] sums over tokens."""
    (num_candidates, rows, vocab), num_parts = premature.shape, softmax.shape[-1]
    parts = torch.empty(num_candidates, rows, num_parts, device=mature.device)
    divergence_kernel[rows, num_parts](
        mature, premature, softmax, parts, num_candidates, vocab, PUBLISHED=form == "reference",
        PARTS=triton.next_power_of_2(num_parts), BLOCK=BLOCK, **options(WARPS),
    )  # fmt: skip
    return parts


_UNSPECIALIZED: Any = ["num_rows", "num_candidates", "num_parts", "vocab"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def softmax_kernel(mature_ptr, premature_ptr, softmax_ptr, num_rows, vocab, BLOCK: tl.constexpr):
    """One part of one row of logits, the mature ones first."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entries = part * BLOCK + tl.arange(0, BLOCK)
    logit_ptr = tl.where(
        row < num_rows, mature_ptr + row * vocab, premature_ptr + (row - num_rows) * vocab
    )
    logits = _logits(logit_ptr, entries, vocab)
    top = tl.max(logits, 0)
    # in a part of impossible tokens -inf - -inf would be NaN
    shares = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top))
    place = row * tl.num_programs(1) + part
    tl.store(softmax_ptr + place, top)
    field = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(softmax_ptr + field + place, tl.sum(shares, 0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def divergence_kernel(
    mature_ptr,
    premature_ptr,
    softmax_ptr,
    divergence_ptr,
    num_candidates,
    vocab,
    PUBLISHED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of one row against that of all its candidates."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_rows, num_parts = tl.num_programs(0), tl.num_programs(1)
    lists = (num_candidates + 1) * num_rows
    entries = part * BLOCK + tl.arange(0, BLOCK)
    top, log_sum = _softmax(softmax_ptr, row, lists, num_parts, PARTS)
    log_p = _logits(mature_ptr + row * vocab, entries, vocab) - top - log_sum  # [BLOCK]
    p = tl.exp(log_p)
    for candidate in range(num_candidates):
        other = candidate * num_rows + row
        top, log_sum = _softmax(softmax_ptr, num_rows + other, lists, num_parts, PARTS)
        log_q = _logits(premature_ptr + other * vocab, entries, vocab) - top - log_sum
        q = tl.exp(log_q)
        mean = 0.5 * (p + q)
        # half of the smallest number is none, whose logarithm would be infinite
        log_mean = tl.log(tl.maximum(mean, _LEAST))
        if PUBLISHED:
            terms = _weighed(mean, log_mean - log_p) + _weighed(mean, log_mean - log_q)
        else:
            terms = _weighed(p, log_p - log_mean) + _weighed(q, log_q - log_mean)
        tl.store(divergence_ptr + other * num_parts + part, tl.sum(terms, 0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def score_kernel(
    mature_ptr,
    premature_ptr,
    softmax_ptr,
    divergence_ptr,
    relative_top_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    number_ptr,
    best_ptr,
    place_ptr,
    num_candidates,
    vocab,
    COMPARED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of one row against the candidate that differs most.

    Writes the best key (score / temperature, with noise), its score, the largest score and the sum
    of exp(score - largest); and the token of the key.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_rows, num_parts = tl.num_programs(0), tl.num_programs(1)
    lists = (num_candidates + 1) * num_rows
    place = tl.full((), 0, tl.int32)
    if COMPARED:
        place = _most_different(divergence_ptr, row, num_rows, num_candidates, num_parts, PARTS)
    if part == 0:
        tl.store(place_ptr + row, place.to(tl.int64))
    other = place * num_rows + row
    top, above = _softmax(softmax_ptr, row, lists, num_parts, PARTS)
    below_top, below = _softmax(softmax_ptr, num_rows + other, lists, num_parts, PARTS)
    entries = part * BLOCK + tl.arange(0, BLOCK)
    log_p = _logits(mature_ptr + row * vocab, entries, vocab) - top - above  # [BLOCK]
    threshold = tl.maximum(tl.log(tl.load(relative_top_ptr + row)) - above, -_MOST)
    plausible = (log_p >= threshold) & (entries < vocab)
    base = tl.load(premature_ptr + other * vocab + entries, mask=plausible, other=0.0)
    log_q = tl.minimum(base, _MOST) - below_top - below
    # a premature head that rules a token out makes its score large, not infinite
    scores = tl.where(plausible, log_p - tl.maximum(log_q, -_MOST), float("-inf"))
    temperature = tl.load(temperature_ptr + row)
    keys = scores
    if temperature > 0.0:
        noise = gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row), entries)
        keys = tl.where(plausible, scores / temperature + noise, float("-inf"))
    key, token = first_best(keys, entries)
    largest = tl.max(scores, 0)
    # NaN of either head is NaN of the row
    total = tl.sum(tl.exp(scores - tl.where(largest == float("-inf"), 0.0, largest)), 0)
    total += 0.0 * (above + below)
    at = row * num_parts + part
    field = num_rows.to(tl.int64) * num_parts
    tl.store(number_ptr + at, key)
    tl.store(number_ptr + field + at, tl.max(tl.where(entries == token, scores, float("-inf")), 0))
    tl.store(number_ptr + 2 * field + at, largest)
    tl.store(number_ptr + 3 * field + at, total)
    tl.store(best_ptr + at, token)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def join_kernel(
    number_ptr, best_ptr, token_ptr, log_prob_ptr, num_parts, vocab, PARTS: tl.constexpr
):
    """The parts of one row: its token, and the token's log-probability."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    mask = parts < num_parts
    at = row * num_parts + parts
    field = tl.num_programs(0).to(tl.int64) * num_parts
    keys = tl.load(number_ptr + at, mask=mask, other=float("-inf"))  # [PARTS]
    scores = tl.load(number_ptr + field + at, mask=mask, other=float("-inf"))  # [PARTS]
    tops = tl.load(number_ptr + 2 * field + at, mask=mask, other=float("-inf"))  # [PARTS]
    sums = tl.load(number_ptr + 3 * field + at, mask=mask, other=0.0)  # [PARTS]
    tokens = tl.load(best_ptr + at, mask=mask, other=_NO_TOKEN)  # [PARTS]
    _, token = first_best(keys, tokens)
    score = tl.max(tl.where(tokens == token, scores, float("-inf")), 0)
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp(tops - tl.where(top == float("-inf"), 0.0, top)), 0)
    # a row of NaN has no best token; what is stored stays a legal one
    tl.store(token_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))
    tl.store(log_prob_ptr + row, score - top - tl.log(total))


@triton.jit
def _logits(logit_ptr, entries, vocab):
    """Numbers of a row; +inf counts as the largest finite one."""
    logits = tl.load(logit_ptr + entries, mask=entries < vocab, other=float("-inf"))
    return tl.where(logits > _MOST, _MOST, logits)


@triton.jit
def _weighed(weights, distances):
    """What has no weight counts for nothing, not for 0 times infinity."""
    return tl.where(weights == 0.0, 0.0, weights * distances)


@triton.jit
def _softmax(softmax_ptr, row, num_lists, num_parts, PARTS: tl.constexpr):
    """The largest logit of a row, and the logarithm of the sum of exp(x - largest)."""
    parts = tl.arange(0, PARTS)
    mask = parts < num_parts
    place = softmax_ptr + row * num_parts + parts
    tops = tl.load(place, mask=mask, other=float("-inf"))
    sums = tl.load(place + num_lists.to(tl.int64) * num_parts, mask=mask, other=0.0)
    top = tl.max(tops, 0)
    shares = tl.exp(tops - tl.where(top == float("-inf"), 0.0, top))
    return top, tl.log(tl.sum(tl.where(sums == 0.0, 0.0, sums * shares), 0))


@triton.jit
def _most_different(
    divergence_ptr, row, num_rows, num_candidates, num_parts, PARTS: tl.constexpr
):  # fmt: skip
    """Of equals the first; NaN before all, as the row then has no numbers."""
    parts = tl.arange(0, PARTS)
    place, most = tl.full((), 0, tl.int32), float("-inf")
    for candidate in range(num_candidates):
        at = (candidate * num_rows + row) * num_parts + parts
        own = tl.sum(tl.load(divergence_ptr + at, mask=parts < num_parts, other=0.0), 0)
        # a NaN stays: nothing is greater
        is_more = (own > most) | ((own != own) & (most == most))
        place = tl.where(is_more, candidate, place)
        most = tl.where(is_more, own, most)
    return place
