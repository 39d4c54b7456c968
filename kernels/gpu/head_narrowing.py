"""What top-k, top-p and min-p leave of a row, and the draw from that: the end of ``heads``.

All three keep the tokens whose key (score / temperature) is large enough, so a row is narrowed by
one number. It is searched among the tiles that can hold a kept token: which those are follows from
the largest key of each tile. Sums are sums of integers: nothing depends on the order of tiles.

Knows nothing of heads or hidden states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multiexit_engine.kernels.head_lists import edited_score, from_order, in_order
from multiexit_engine.kernels.noise import gumbel

_NO_TOKEN = tl.constexpr(2147483647)
_UNIT = tl.constexpr(1099511627776.0)
# More than there are tokens, or tiles.
_MANY = tl.constexpr(1 << 30)


@triton.jit
def _units(below):
    """exp(below), below <= 0, in units of 2^-40."""
    return (tl.exp(below) * _UNIT).to(tl.int64)


@triton.jit
def _append(listed_ptr, row, live, count, num_tiles, TILES: tl.constexpr):
    """List the tiles that are ``live`` [TILES] after ``count`` others; how many are listed now."""
    ones = live.to(tl.int32)
    place = count + tl.cumsum(ones, 0) - ones
    tl.store(listed_ptr + row * num_tiles + place, tl.arange(0, TILES), mask=live)
    return count + tl.sum(ones, 0)


@triton.jit
def _listed_places(
    listed_ptr, row, start, count, num_tiles, BLOCK_V: tl.constexpr, LISTED: tl.constexpr
):
    """Tokens and their places in scratch of the listed tiles from ``start`` on: [tokens]."""
    lane = tl.arange(0, LISTED * BLOCK_V)
    index = start + lane // BLOCK_V
    mask = index < count
    tile = tl.load(listed_ptr + row * num_tiles + index, mask=mask, other=0)
    token = tile * BLOCK_V + lane % BLOCK_V
    return token, row * num_tiles * BLOCK_V + token, mask


@triton.jit
def _keys(
    key_ptr, listed_ptr, row, start, count, num_tiles, BLOCK_V: tl.constexpr, LISTED: tl.constexpr
):
    """Tokens and keys of the listed tiles from ``start`` on, -inf for no token."""
    token, place, mask = _listed_places(listed_ptr, row, start, count, num_tiles, BLOCK_V, LISTED)
    return token, tl.load(key_ptr + place, mask=mask, other=float("-inf"))


@triton.jit
def _fill_keys(
    logit_ptr, score_ptr, listed_ptr, row, start, count, threshold, shift, base, heat, vocab,
    edited_ptr, entry_ptr, allowed_ptr, add_ptr, penalty_ptr, loss_ptr, num_tiles,
    BLOCK_V: tl.constexpr, LISTED: tl.constexpr, EDITED: tl.constexpr,
):  # fmt: skip
    """Write keys over contrast scores, and what they came from before any edit over logits.

    Of the listed tiles from ``start`` on. Returns the largest key.
    """
    top = float("-inf")
    for first in range(start, count, LISTED):
        token, place, mask = _listed_places(
            listed_ptr, row, first, count, num_tiles, BLOCK_V, LISTED
        )
        logit = tl.load(logit_ptr + place, mask=mask, other=float("-inf"))
        is_token = logit > float("-inf")
        plausible = is_token & (logit >= threshold)
        score = tl.load(score_ptr + place, mask=plausible, other=0.0)
        final = tl.where(plausible, score + shift, logit)
        wanted = final
        if EDITED:
            wanted = edited_score(
                final, base, token, is_token, row, vocab, edited_ptr, entry_ptr, allowed_ptr,
                add_ptr, penalty_ptr, loss_ptr,
            )  # fmt: skip
        key = tl.where(is_token, wanted / heat, float("-inf"))
        tl.store(logit_ptr + place, final, mask=mask)
        tl.store(score_ptr + place, key, mask=mask)
        top = tl.maximum(top, tl.max(key, 0))
    # what one thread wrote others read
    tl.debug_barrier()
    return top


@triton.jit
def _mass(
    key_ptr, listed_ptr, row, count, bound, top, num_tiles,
    BLOCK_V: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The units of exp(key - top) of the listed tokens whose key, in order, is ``bound`` at least.

    And how many those are.
    """
    units = tl.zeros((), tl.int64)
    found = tl.zeros((), tl.int32)
    for start in range(0, count, LISTED):
        _, key = _keys(key_ptr, listed_ptr, row, start, count, num_tiles, BLOCK_V, LISTED)
        is_in = in_order(key) >= bound
        units += tl.sum(tl.where(is_in, _units(key - top), 0), 0)
        found += tl.sum(is_in.to(tl.int32), 0)
    return units, found


@triton.jit
def _tile_bound(bounds, top, target, BY_MASS: tl.constexpr):
    """A key above which the best token of each tile alone is enough for ``target``.

    ``target`` is a number of tokens or, BY_MASS, units of exp(key - top). Hence no token below is
    kept. -inf where all best tokens together are too few; not much smaller than it could be.
    """
    far = 1.0
    enough = _enough(bounds, top - far, top, target, BY_MASS)
    while (enough == 0) & (far < 1e9):
        far *= 4
        enough = _enough(bounds, top - far, top, target, BY_MASS)
    near = tl.where(far > 1.0, far / 4, 0.0)
    for _ in range(6):
        middle = (near + far) / 2
        reached = _enough(bounds, top - middle, top, target, BY_MASS)
        far = tl.where(reached, middle, far)
        near = tl.where(reached, near, middle)
    return tl.where(enough, top - far, float("-inf"))


@triton.jit
def _enough(bounds, bound, top, target, BY_MASS: tl.constexpr):
    if BY_MASS:
        units = tl.where(bounds >= bound, _units(bounds - top), 0)
        return tl.sum(units, 0) >= target
    return tl.sum((bounds >= bound).to(tl.int64), 0) >= target


@triton.jit
def _least_kept(
    key_ptr, listed_ptr, row, count, low, top, target, num_tiles,
    BY_MASS: tl.constexpr, BLOCK_V: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The largest key, in order, that tokens of ``target`` reach together; ``low`` is small enough.

    A smaller number may be returned where it selects the same tokens. ``target`` is as in
    ``_tile_bound``. Returns besides what the tokens above it weigh, and how many tokens have it
    (more than there are, where nobody counted).
    """
    high = in_order(top).to(tl.int64) + 1
    reached_by = tl.zeros((), tl.int32) + _MANY
    missed_by = tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int64)
    step = 0
    while (high - low > 1) & (reached_by - missed_by > 1):
        # Halves the distance of the numbers first, which is quick, then the span of all numbers,
        # which always ends.
        middle = (low + high) // 2
        if step < 24:
            lowest = tl.maximum(from_order(low), -3e38)
            middle = in_order(lowest / 2 + from_order(high - 1) / 2).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        units, found = _mass(
            key_ptr, listed_ptr, row, count, middle, top, num_tiles, BLOCK_V, LISTED
        )
        weight = found.to(tl.int64)
        if BY_MASS:
            weight = units
        reached = weight >= target
        low = tl.where(reached, middle, low)
        reached_by = tl.where(reached, found, reached_by)
        high = tl.where(reached, high, middle)
        missed_by = tl.where(reached, missed_by, found)
        above = tl.where(reached, above, weight)
        step += 1
    return low, above, reached_by - missed_by


@triton.jit
def _first_of_equals(
    key_ptr, listed_ptr, row, count, key, wanted, vocab, num_tiles,
    BLOCK_V: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The token id from which on ``wanted`` tokens have this key (in order); 0 for too few."""
    low = tl.zeros((), tl.int32)
    high = low + vocab
    while high - low > 1:
        middle = (low + high) // 2
        found = tl.zeros((), tl.int64)
        for start in range(0, count, LISTED):
            token, own = _keys(key_ptr, listed_ptr, row, start, count, num_tiles, BLOCK_V, LISTED)
            found += tl.sum(((in_order(own) == key) & (token >= middle)).to(tl.int64), 0)
        low = tl.where(found >= wanted, middle, low)
        high = tl.where(found >= wanted, high, middle)
    return low


@triton.jit
def narrowed_choice(
    tile_stat_ptr, listed_ptr, logit_ptr, score_ptr, row, num_rows, num_tiles, vocab,
    top_k, unlikely, min_p, temperature, seed, position, threshold, shift, base,
    edited_ptr, entry_ptr, allowed_ptr, add_ptr, penalty_ptr, loss_ptr,
    TILES: tl.constexpr, BLOCK_V: tl.constexpr, LISTED: tl.constexpr, CONTRAST: tl.constexpr,
    EDITED: tl.constexpr,
):  # fmt: skip
    """The best key with noise of the tokens that are kept, its token and what that scored before.

    And how many tiles are listed then, whose scratch holds what tokens scored before in the end.
    All logits of the row lie in scratch. Of a tile none of whose tokens is plausible or edited the
    numbers of the first launch hold: the largest key, and the sum of exp(key - largest). Of the
    others keys are made here, before it is known how far down tiles may hold kept tokens.
    """
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    place = row * num_tiles + tiles
    field = num_rows.to(tl.int64) * num_tiles
    bounds = tl.load(tile_stat_ptr + 2 * field + place, mask=mask, other=float("-inf"))  # [TILES]
    sums = tl.load(tile_stat_ptr + 4 * field + place, mask=mask, other=0.0)  # [TILES]
    is_special = mask & (tiles < 0)
    if CONTRAST:
        tops = tl.load(tile_stat_ptr + place, mask=mask, other=float("-inf"))  # [TILES]
        is_special = is_special | (mask & (tops >= threshold))
    if EDITED:
        word = row * ((vocab + 31) // 32) + tiles * BLOCK_V // 32
        is_special = is_special | (tl.load(edited_ptr + word, mask=mask, other=0) != 0)
    bounds = tl.where(is_special, float("-inf"), bounds)

    # the list that the first launch made has been read by all threads
    tl.debug_barrier()
    num_special = _append(listed_ptr, row, is_special, 0, num_tiles, TILES)
    tl.debug_barrier()
    top = _fill_keys(
        logit_ptr, score_ptr, listed_ptr, row, 0, num_special, threshold, shift, base,
        temperature, vocab, edited_ptr, entry_ptr, allowed_ptr, add_ptr, penalty_ptr, loss_ptr,
        num_tiles, BLOCK_V, LISTED, EDITED,
    )  # fmt: skip
    top = tl.maximum(top, tl.max(bounds, 0))
    least = in_order(tl.full((), -3.4028234e38, tl.float32)).to(tl.int64)
    # with nothing left but -inf every difference is to be -inf, not NaN
    finite_top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((), tl.int64)
    bound = float("-inf")
    if top_k > 0:
        bound = _tile_bound(bounds, finite_top, top_k.to(tl.int64), False)
    elif unlikely >= 0:
        special, _ = _mass(
            score_ptr, listed_ptr, row, num_special, least, finite_top, num_tiles, BLOCK_V, LISTED
        )
        own = tl.where(is_special, 0.0, sums * tl.exp(bounds - finite_top))
        total = special + tl.sum((own * _UNIT).to(tl.int64), 0)
        target = tl.maximum(total - (unlikely * total.to(tl.float32)).to(tl.int64), 1)
        bound = _tile_bound(bounds, finite_top, target, True)
    else:
        bound = finite_top + tl.log(min_p) - 0.01
    is_live = mask & (is_special == 0) & (bounds >= bound) & (bounds > float("-inf"))
    count = _append(listed_ptr, row, is_live, num_special, num_tiles, TILES)
    tl.debug_barrier()
    _fill_keys(
        logit_ptr, score_ptr, listed_ptr, row, num_special, count, threshold, shift, base,
        temperature, vocab, edited_ptr, entry_ptr, allowed_ptr, add_ptr, penalty_ptr, loss_ptr,
        num_tiles, BLOCK_V, LISTED, EDITED,
    )  # fmt: skip

    low = tl.maximum(least, in_order(bound).to(tl.int64))
    first = tl.zeros((), tl.int32)
    if top_k > 0:
        low, _, _ = _least_kept(
            score_ptr, listed_ptr, row, count, low, finite_top, top_k.to(tl.int64), num_tiles,
            False, BLOCK_V, LISTED,
        )  # fmt: skip
        total, _ = _mass(
            score_ptr, listed_ptr, row, count, low, finite_top, num_tiles, BLOCK_V, LISTED
        )
    if unlikely >= 0:
        target = tl.maximum(total - (unlikely * total.to(tl.float32)).to(tl.int64), 1)
        low, above, equals = _least_kept(
            score_ptr, listed_ptr, row, count, low, finite_top, target, num_tiles,
            True, BLOCK_V, LISTED,
        )  # fmt: skip
        each = tl.maximum(_units(from_order(low) - finite_top), 1)
        wanted = (target - above + each - 1) // each
        if wanted < equals:
            first = _first_of_equals(
                score_ptr, listed_ptr, row, count, low, wanted, vocab, num_tiles, BLOCK_V, LISTED
            )

    best = float("-inf")
    choice = _NO_TOKEN + 0
    value = float("-inf")
    for start in range(0, count, LISTED):
        token, spot, here = _listed_places(
            listed_ptr, row, start, count, num_tiles, BLOCK_V, LISTED
        )
        key = tl.load(score_ptr + spot, mask=here, other=float("-inf"))
        final = tl.load(logit_ptr + spot, mask=here, other=float("-inf"))
        order = in_order(key)
        kept = (order > low) | ((order == low) & (token >= first))
        kept = kept & (key > float("-inf")) & (tl.exp(key - finite_top) >= min_p)
        noisy = tl.where(kept, key + gumbel(seed, position, token), float("-inf"))
        largest = tl.max(noisy, 0)
        lowest = tl.min(tl.where(kept & (noisy == largest), token, _NO_TOKEN), 0)
        own = tl.max(tl.where(kept & (token == lowest), final, float("-inf")), 0)
        better = (largest > best) | ((largest == best) & (lowest < choice))
        best = tl.where(better, largest, best)
        choice = tl.where(better, lowest, choice)
        value = tl.where(better, own, value)
    return best, choice, value, count
