"""The last half of ``heads``: from the results of all tiles to one token and its log-probability.

One program for each row. Knows nothing of heads or hidden states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multiexit_engine.kernels.head_best import tell_best
from multiexit_engine.kernels.head_lists import (
    candidates,
    edited_score,
    first_best,
    from_order,
    in_order,
    is_narrowed,
)
from multiexit_engine.kernels.head_narrowing import narrowed_choice
from multiexit_engine.kernels.noise import gumbel

_NO_TOKEN = tl.constexpr(2147483647)
# Sums over candidates are taken in integers of 2^-40, so their order does not matter.
_UNIT = tl.constexpr(1099511627776.0)


@triton.jit
def _log_sum(tile_stat_ptr, row, num_rows, num_tiles, TILES: tl.constexpr):
    """The row's log-sum-exp over all tiles, in a fixed order, and its largest logit."""
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    place = row * num_tiles + tiles
    field = num_rows.to(tl.int64) * num_tiles
    tops = tl.load(tile_stat_ptr + place, mask=mask, other=float("-inf"))  # [TILES]
    sums = tl.load(tile_stat_ptr + field + place, mask=mask, other=0.0)  # [TILES]
    top = tl.max(tops, 0)
    return top + tl.log(tl.sum(sums * tl.exp(tops - top), 0)), top


@triton.jit
def _best_tile(tile_stat_ptr, tile_token_ptr, row, num_rows, num_tiles, TILES: tl.constexpr):
    """The row's best key over all tiles, its lowest token and the logit of that."""
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    place = row * num_tiles + tiles
    field = num_rows.to(tl.int64) * num_tiles
    keys = tl.load(tile_stat_ptr + 2 * field + place, mask=mask, other=float("-inf"))  # [TILES]
    values = tl.load(tile_stat_ptr + 3 * field + place, mask=mask, other=0.0)  # [TILES]
    tokens = tl.load(tile_token_ptr + place, mask=mask, other=_NO_TOKEN)  # [TILES]
    key, token = first_best(keys, tokens)
    return key, token, tl.max(tl.where(tokens == token, values, float("-inf")), 0)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "vocab"])
def head_finish_kernel(
    tile_stat_ptr,
    tile_token_ptr,
    token_ptr,
    logprob_ptr,
    num_rows,
    num_tiles,
    vocab,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The best key of all tiles."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    log_total, _ = _log_sum(tile_stat_ptr, row, num_rows, num_tiles, TILES)
    _, token, value = _best_tile(tile_stat_ptr, tile_token_ptr, row, num_rows, num_tiles, TILES)
    # A row of NaN has no best token; its log-probability is NaN, its token stays a legal one.
    tl.store(token_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))
    tl.store(logprob_ptr + row, value - log_total)


@triton.jit
def _least_of_largest(
    logit_ptr, row, wanted, num_tiles, vocab, BLOCK_V: tl.constexpr, LISTED: tl.constexpr
):
    """A number that ``wanted`` of the row's logits reach, more only where they are equal.

    All tiles must be listed. Halves the span of all numbers; ends when the count is right.
    """
    low = in_order(tl.full((), -3.4028234e38, tl.float32)).to(tl.int64)
    high = in_order(tl.full((), 3.4028234e38, tl.float32)).to(tl.int64) + 1
    found = tl.zeros((), tl.int64)
    while (high - low > 1) & (found != wanted):
        middle = (low + high) // 2
        found = tl.zeros((), tl.int64)
        for start in range(0, num_tiles, LISTED):
            place = start * BLOCK_V + tl.arange(0, LISTED * BLOCK_V)
            logit = tl.load(
                logit_ptr + row * num_tiles * BLOCK_V + place,
                mask=place < vocab,
                other=float("-inf"),
            )  # [LISTED * BLOCK_V]
            found += tl.sum((in_order(logit) >= middle).to(tl.int64), 0)
        low = tl.where(found >= wanted, middle, low)
        high = tl.where(found >= wanted, high, middle)
    return from_order(low)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "vocab", "most"])
def contrast_finish_kernel(
    edited_ptr,
    entry_ptr,
    allowed_ptr,
    is_edited_ptr,
    add_ptr,
    penalty_ptr,
    loss_ptr,
    top_k_ptr,
    unlikely_ptr,
    min_p_ptr,
    asked_ptr,
    best_id_ptr,
    best_logprob_ptr,
    rank_ptr,
    group_ptr,
    least_ptr,
    alpha_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    running_ptr,
    count_ptr,
    listed_ptr,
    candidate_logit_ptr,
    candidate_score_ptr,
    tile_stat_ptr,
    tile_token_ptr,
    token_ptr,
    logprob_ptr,
    num_candidates_ptr,
    num_rows,
    num_tiles,
    vocab,
    most,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LISTED: tl.constexpr,
    CONTRAST: tl.constexpr,
    MIXED: tl.constexpr,
    LEAST: tl.constexpr,
    EDITED: tl.constexpr,
    NARROWED: tl.constexpr,
    TOLD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The best of the candidates, with the final threshold, and of the tokens below it.

    With the largest logit known, every candidate is either plausible or not; plausible ones share
    their mass in proportion to exp(score). How many those are goes to ``num_candidates_ptr``, if
    it is not None. With LEAST the threshold lets so many tokens pass at
    least; all tiles are listed of rows that ask for another number than 1. With EDITED the listed
    tokens of rows with edits are judged by what these leave of their scores. With NARROWED rows
    that ask for it draw from a part of their tokens. With TOLD rows that ask for it tell their best
    tokens and the rank of the chosen one.
    """
    row = tl.program_id(0).to(tl.int64)
    alpha = tl.load(alpha_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    count = tl.load(count_ptr + row)
    threshold = tl.load(running_ptr + row) + tl.log(tl.minimum(tl.maximum(alpha, 0.0), 1.0))
    log_total, top = _log_sum(tile_stat_ptr, row, num_rows, num_tiles, TILES)
    is_scored = temperature > 0
    base = 0.0
    if not CONTRAST:
        is_scored = temperature >= 0
        threshold = top + float("inf")
    else:
        base = log_total
    if EDITED:
        is_scored = is_scored | (tl.load(is_edited_ptr + row) != 0)
    if LEAST:
        least = tl.load(least_ptr + row)
        if least != 1:
            bound = float("-inf")
            if (least > 1) & (least <= vocab):
                bound = _least_of_largest(
                    candidate_logit_ptr, row, least, num_tiles, vocab, BLOCK_V, LISTED
                )
            threshold = tl.minimum(threshold, bound)
    if MIXED:
        is_alone = tl.load(group_ptr + row) < 0
        is_scored = is_scored | is_alone
        threshold = tl.where(is_alone, float("inf"), threshold)
        base = tl.where(is_alone, 0.0, base)

    best = float("-inf")
    choice = _NO_TOKEN + 0
    for start in range(0, count, LISTED):
        token, logit, score = candidates(
            listed_ptr, candidate_logit_ptr, candidate_score_ptr, row, start, count, num_tiles,
            BLOCK_V, LISTED,
        )  # fmt: skip
        plausible = (logit >= threshold) & (logit > float("-inf"))
        score = tl.where(plausible, score, float("-inf"))
        largest = tl.max(tl.max(score, 1), 0)
        lowest = tl.where(plausible & (score == largest), token, _NO_TOKEN)
        lowest = tl.min(tl.min(lowest, 1), 0)
        lowest = tl.where(largest == best, tl.minimum(choice, lowest), lowest)
        choice = tl.where(largest >= best, lowest, choice)
        best = tl.maximum(best, largest)

    score_units = tl.zeros((), tl.int64)
    mass_units = tl.zeros((), tl.int64)
    num_plausible = tl.zeros((), tl.int32)
    for start in range(0, count, LISTED):
        token, logit, score = candidates(
            listed_ptr, candidate_logit_ptr, candidate_score_ptr, row, start, count, num_tiles,
            BLOCK_V, LISTED,
        )  # fmt: skip
        plausible = (logit >= threshold) & (logit > float("-inf"))
        share = tl.where(plausible, tl.exp(score - best) * _UNIT, 0.0).to(tl.int64)
        mass = tl.where(plausible, tl.exp(logit - top) * _UNIT, 0.0).to(tl.int64)
        score_units += tl.sum(tl.sum(share, 1), 0)
        mass_units += tl.sum(tl.sum(mass, 1), 0)
        num_plausible += tl.sum(tl.sum(plausible.to(tl.int32), 1), 0)
    # What turns the score of a plausible token into a logit of the contrasted distribution.
    shift = top - best + tl.log(mass_units.to(tl.float32)) - tl.log(score_units.to(tl.float32))
    value = best + shift

    narrows = False
    if NARROWED:
        top_k = tl.load(top_k_ptr + row)
        unlikely = tl.load(unlikely_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        narrows = is_narrowed(top_k, unlikely, min_p, temperature)
        if narrows:
            seed = tl.load(seed_ptr + row)
            position = tl.load(position_ptr + row)
            key, choice, value, count = narrowed_choice(
                tile_stat_ptr, listed_ptr, candidate_logit_ptr, candidate_score_ptr, row, num_rows,
                num_tiles, vocab, top_k, unlikely, min_p, temperature, seed, position, threshold,
                shift, base, edited_ptr, entry_ptr, allowed_ptr, add_ptr, penalty_ptr, loss_ptr,
                TILES, BLOCK_V, LISTED, CONTRAST, EDITED,
            )  # fmt: skip
    if is_scored & (narrows == 0):
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row)
        heat = tl.where(temperature > 0, temperature, 1.0)
        key, choice, value = _best_tile(
            tile_stat_ptr, tile_token_ptr, row, num_rows, num_tiles, TILES
        )
        for start in range(0, count, LISTED):
            token, logit, score = candidates(
                listed_ptr, candidate_logit_ptr, candidate_score_ptr, row, start, count, num_tiles,
                BLOCK_V, LISTED,
            )  # fmt: skip
            plausible = logit >= threshold
            final = tl.where(plausible, score + shift, logit)
            wanted = final
            if EDITED:
                wanted = edited_score(
                    final, base, token, logit > float("-inf"), row, vocab, edited_ptr, entry_ptr,
                    allowed_ptr, add_ptr, penalty_ptr, loss_ptr,
                )  # fmt: skip
            keys = wanted / heat
            if temperature > 0:
                keys += gumbel(seed, position, token)
            keys = tl.where(logit > float("-inf"), keys, float("-inf"))
            largest = tl.max(tl.max(keys, 1), 0)
            found = (keys == largest) & (logit > float("-inf"))
            lowest = tl.min(tl.min(tl.where(found, token, _NO_TOKEN), 1), 0)
            here = tl.where(found & (token == lowest), final, float("-inf"))
            here = tl.max(tl.max(here, 1), 0)
            better = (largest > key) | ((largest == key) & (lowest < choice))
            key = tl.where(better, largest, key)
            choice = tl.where(better, lowest, choice)
            value = tl.where(better, here, value)
        if EDITED:
            # no token is left
            value = tl.where(key == float("-inf"), key, value)

    if TOLD:
        asked = tl.load(asked_ptr + row)
        if asked >= 0:
            # of a narrowed row scratch holds the scores of plausible tokens as they are in the end
            raw = tl.where(narrows, float("inf"), threshold)
            tell_best(
                asked, best_id_ptr, best_logprob_ptr, rank_ptr, most, tile_stat_ptr, listed_ptr,
                candidate_logit_ptr, candidate_score_ptr, row, count, num_tiles, vocab, raw, shift,
                log_total, value - log_total, TILES, CONTRAST, BLOCK_V, LISTED,
            )  # fmt: skip

    # A row of NaN has no best token; its log-probability is NaN, its token stays a legal one.
    tl.store(token_ptr + row, tl.minimum(choice, vocab - 1).to(tl.int64))
    tl.store(logprob_ptr + row, value - log_total)
    if num_candidates_ptr is not None:
        tl.store(num_candidates_ptr + row, num_plausible)
    # The scratch is left as found, so that a replayed graph needs no node to fill it.
    tl.store(running_ptr + row, float("-inf"))
    tl.store(count_ptr + row, 0)
