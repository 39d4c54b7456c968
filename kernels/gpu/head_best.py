"""The best tokens of a row and the rank of the chosen one: what ``heads`` tells if it is asked.

All logits of the row lie in scratch; which of them are read follows from the largest one of each
tile. Knows nothing of heads, hidden states or of how the token was chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _finals(logit_ptr, score_ptr, place, mask, threshold, shift, CONTRAST: tl.constexpr):
    """Logits of the row's distribution: scores of plausible tokens shifted, others as they are."""
    final = tl.load(logit_ptr + place, mask=mask, other=float("-inf"))
    if CONTRAST:
        plausible = (final >= threshold) & (final > float("-inf"))
        score = tl.load(score_ptr + place, mask=plausible, other=0.0)
        final = tl.where(plausible, score + shift, final)
    return final


@triton.jit
def _renew_tops(
    tile_stat_ptr, listed_ptr, logit_ptr, score_ptr, row, count, num_tiles, threshold, shift,
    BLOCK_V: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Write over the largest logits of listed tiles what is largest in the row's distribution."""
    for start in range(0, count, LISTED):
        index = start + tl.arange(0, LISTED)
        mask = index < count
        tile = tl.load(listed_ptr + row * num_tiles + index, mask=mask, other=0)  # [LISTED]
        place = (row * num_tiles + tile[:, None]) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        final = _finals(logit_ptr, score_ptr, place, mask[:, None], threshold, shift, True)
        tl.store(tile_stat_ptr + row * num_tiles + tile, tl.max(final, 1), mask=mask)
    # what one thread wrote others read
    tl.debug_barrier()


@triton.jit
def _rank(
    tile_stat_ptr, logit_ptr, score_ptr, row, num_tiles, threshold, shift, log_total, own,
    CONTRAST: tl.constexpr, BLOCK_V: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """1 + how many tokens have a larger log-probability than ``own``; reads tiles with any."""
    rank = tl.full((), 1, tl.int64)
    for start in range(0, num_tiles, LISTED):
        tile = start + tl.arange(0, LISTED)
        top = tl.load(
            tile_stat_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf")
        )  # [LISTED]
        mask = (tile < num_tiles) & (top - log_total > own)
        if tl.max(mask.to(tl.int32), 0) > 0:
            place = (row * num_tiles + tile[:, None]) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
            final = _finals(logit_ptr, score_ptr, place, mask[:, None], threshold, shift, CONTRAST)
            above = (final - log_total > own).to(tl.int64)
            rank += tl.sum(tl.sum(above, 1), 0)
    return rank


@triton.jit
def tell_best(
    asked, best_id_ptr, best_logprob_ptr, rank_ptr, most, tile_stat_ptr, listed_ptr, logit_ptr,
    score_ptr, row, count, num_tiles, vocab, threshold, shift, log_total, own,
    TILES: tl.constexpr, CONTRAST: tl.constexpr, BLOCK_V: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Store the ``asked`` best tokens of a row, one by one, and the rank of its chosen one.

    The best token that is left lies in the tile with the largest number that is left, and what is
    left of a tile follows from the token that was taken last.
    """
    if CONTRAST:
        _renew_tops(
            tile_stat_ptr, listed_ptr, logit_ptr, score_ptr, row, count, num_tiles, threshold,
            shift, BLOCK_V, LISTED,
        )  # fmt: skip
    rank = _rank(
        tile_stat_ptr, logit_ptr, score_ptr, row, num_tiles, threshold, shift, log_total, own,
        CONTRAST, BLOCK_V, LISTED,
    )  # fmt: skip
    tl.store(rank_ptr + row, rank)
    tiles = tl.arange(0, TILES)
    tops = tl.load(
        tile_stat_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf")
    )  # [TILES]
    last_best = float("inf")
    last_token = tl.full((), -1, tl.int32)
    for number in range(asked):
        top = tl.max(tops, 0)
        tile = tl.minimum(tl.min(tl.where(tops == top, tiles, _NO_TOKEN), 0), num_tiles - 1)
        token = tile * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        final = _finals(
            logit_ptr, score_ptr, row * num_tiles * BLOCK_V + token, token < vocab, threshold,
            shift, CONTRAST,
        )  # fmt: skip
        left = (final < last_best) | ((final == last_best) & (token > last_token))
        left = left & (token < vocab)
        last_best = tl.max(tl.where(left, final, float("-inf")), 0)
        last_token = tl.min(tl.where(left & (final == last_best), token, _NO_TOKEN), 0)
        # a row of NaN has no best token; what is stored stays a legal one
        spot = row * most + number
        tl.store(best_id_ptr + spot, tl.minimum(last_token, vocab - 1).to(tl.int64))
        tl.store(best_logprob_ptr + spot, last_best - log_total)
        left = left & ((final < last_best) | (token > last_token))
        rest = tl.max(tl.where(left, final, float("-inf")), 0)
        tops = tl.where(tiles == tile, rest, tops)
