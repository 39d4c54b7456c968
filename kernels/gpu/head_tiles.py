"""The streaming half of ``heads``: a tile of the vocabulary times a block of rows, reduced at once.

Knows nothing of how the tiles' results become tokens: that is ``head_finish``'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multiexit_engine.kernels.code_tiles import multiplied_codes, multiplied_e4m3
from multiexit_engine.kernels.head_lists import is_narrowed
from multiexit_engine.kernels.noise import gumbel

_NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _plain_logits(
    hidden_ptr,
    weight_ptr,
    rows,
    row_mask,
    entries,
    entry_mask,
    width,
    EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BLOCK_V, BLOCK_R] float32 products; masked entries are not read and give 0."""
    columns = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + entries.to(tl.int64)[:, None] * width + columns[None, :]
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
    if STAGES == 0:
        # The whole width at once: every load is in flight before the first is used.
        mask = columns < width
        weight = tl.load(  # [BLOCK_V, BLOCK_K]
            weight_ptrs,
            mask=entry_mask[:, None] & mask[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        hidden = tl.load(hidden_ptrs, mask=row_mask[:, None] & mask[None, :], other=0.0)
        return tl.sum(weight.to(tl.float32) * hidden.to(tl.float32), 1)[:, None]
    if BLOCK_R == 1:
        partial = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    else:
        partial = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    for k in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        weight_mask = entry_mask[:, None]
        hidden_mask = row_mask[:, None]
        if not EVEN:
            weight_mask = weight_mask & (k + columns < width)[None, :]
            hidden_mask = hidden_mask & (k + columns < width)[None, :]
        weight = tl.load(  # [BLOCK_V, BLOCK_K]
            weight_ptrs + k, mask=weight_mask, other=0.0, eviction_policy="evict_first"
        )
        hidden = tl.load(hidden_ptrs + k, mask=hidden_mask, other=0.0)  # [BLOCK_R, BLOCK_K]
        if BLOCK_R == 1:
            partial += weight.to(tl.float32) * hidden.to(tl.float32)
        elif weight.dtype == tl.float32:
            partial = tl.dot(weight, hidden.T, partial, input_precision="ieee")
        else:
            partial = tl.dot(weight, hidden.T, partial)
    if BLOCK_R == 1:
        partial = tl.sum(partial, 1)[:, None]
    return partial


@triton.jit
def tile_logits(
    hidden_ptr, weight_ptr, scale_ptr, rows, row_mask, entries, entry_mask,
    width, code_stride, num_groups, BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_V, BLOCK_R] float32 products; masked entries are not read and give 0.

    BITS and GROUP say how the matrix is stored, as for ``product_kernel``.
    """
    if BITS == 0:
        logits = _plain_logits(
            hidden_ptr, weight_ptr, rows, row_mask, entries, entry_mask,
            width, EVEN, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
        )  # fmt: skip
    elif GROUP == 0:
        logits = multiplied_e4m3(
            hidden_ptr, weight_ptr, scale_ptr, rows, row_mask, entries, entry_mask,
            0, width, code_stride, width, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        logits = multiplied_codes(
            hidden_ptr, weight_ptr, scale_ptr, rows, row_mask, entries, entry_mask,
            0, width, width, code_stride, num_groups, width,
            BITS, GROUP, BLOCK_V, BLOCK_R, STAGES,
        )  # fmt: skip
    return logits


@triton.jit
def head_logits_tile(
    hidden_ptr, weight_ptr, scale_ptr, bias_ptr, rows, row_mask, entries, entry_mask,
    width, code_stride, num_groups, BITS: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_V, BLOCK_R] float32 logits; -inf of masked entries."""
    logits = tile_logits(
        hidden_ptr, weight_ptr, scale_ptr, rows, row_mask, entries, entry_mask,
        width, code_stride, num_groups, BITS, GROUP, EVEN, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + entries, mask=entry_mask, other=0.0)  # [BLOCK_V]
        logits += bias.to(tl.float32)[:, None]
    return tl.where(entry_mask[:, None], logits, float("-inf"))


@triton.jit
def best_of(keys, values, entries):
    """Per row: the largest key, its lowest entry, and the value there."""
    key = tl.max(keys, 0)  # [BLOCK_R]
    entry = tl.min(tl.where(keys == key[None, :], entries[:, None], _NO_TOKEN), 0)
    value = tl.max(tl.where(entries[:, None] == entry[None, :], values, float("-inf")), 0)
    return key, entry, value


@triton.jit
def _lower_logits(
    lower_ptr, like_ptr, scale_ptr, lower_table_ptr, num_lowers, group, live, keep, bias_ptr,
    rows, entries, width, code_stride, num_groups, BITS: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_V, BLOCK_R] logits of each row's own lower head, right where ``keep`` says so.

    A head is read only for tiles in which one of its own rows has a candidate. All are stored as
    the upper head is, of whose numbers and scales ``like_ptr`` and ``scale_ptr`` tell the types.
    """
    lower = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    for which in range(num_lowers):
        mine = live & (group == which)
        if tl.max(mine.to(tl.int32), 0) > 0:
            address = tl.load(lower_table_ptr + 3 * which)
            weight_ptr = address.to(tl.pointer_type(like_ptr.dtype.element_ty), bitcast=True)
            own_scale_ptr = scale_ptr
            if BITS > 0:
                address = tl.load(lower_table_ptr + 3 * which + 2)
                own_scale_ptr = address.to(
                    tl.pointer_type(scale_ptr.dtype.element_ty), bitcast=True
                )
            wanted = tl.max((keep & mine[None, :]).to(tl.int32), 1) > 0
            product = tile_logits(
                lower_ptr, tl.multiple_of(weight_ptr, 16), own_scale_ptr, rows, mine, entries,
                wanted, width, code_stride, num_groups, BITS, GROUP,
                EVEN, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
            )  # fmt: skip
            if HAS_BIAS:
                is_biased = tl.load(lower_table_ptr + 3 * which + 1)
                bias = tl.load(bias_ptr + entries, mask=wanted & (is_biased > 0), other=0.0)
                product += bias.to(tl.float32)[:, None]
            lower = tl.where(mine[None, :], product, lower)
    return lower


@triton.jit(do_not_specialize=["num_rows", "num_lowers", "vocab"])
def head_kernel(
    upper_ptr,
    upper_weight_ptr,
    scale_ptr,
    bias_ptr,
    lower_ptr,
    lower_weight_ptr,
    lower_scale_ptr,
    lower_table_ptr,
    group_ptr,
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
    edited_ptr,
    allowed_ptr,
    top_k_ptr,
    unlikely_ptr,
    min_p_ptr,
    asked_ptr,
    num_rows,
    num_lowers,
    vocab,
    width,
    code_stride,
    num_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CONTRAST: tl.constexpr,
    MIXED: tl.constexpr,
    EDITED: tl.constexpr,
    NARROWED: tl.constexpr,
    TOLD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of the vocabulary for one block of rows.

    Writes for each row and tile the statistics (max, sum of exp, best key, its logit) and the best
    token. With CONTRAST the best key is that of the tokens that cannot be plausible; the others,
    the candidates, are listed with their logit and their contrast score. With MIXED each row has
    a lower head of its own, by its place in the table of addresses (of numbers and scales, and
    between them whether there is a bias), or none (-1). BITS and GROUP tell how all heads are
    stored, as for ``product_kernel``. With EDITED
    tokens whose scores will be edited are listed as well, and those not allowed are never best;
    both are bits, of which a tile has one word for each row. With NARROWED rows that draw from a
    part of their tokens get all their logits in scratch, keys without noise of tokens that are
    allowed and not edited, and the sum of exp(key - best) of those. With TOLD rows that ask for
    their best tokens get all their logits in scratch, too.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(1)
    num_tiles = tl.num_programs(1)
    entries = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    entry_mask = entries < vocab
    row_mask = rows < num_rows
    temperature = tl.load(temperature_ptr + rows, mask=row_mask, other=0.0)  # [BLOCK_R]
    if CONTRAST:
        if MIXED:
            group = tl.load(group_ptr + rows, mask=row_mask, other=-1)  # [BLOCK_R]
        # Read before the product, which hides the latency, and looked at behind it: a number that
        # is waited for here would hold up the weights. An old one is a lower bound all the same.
        # A number for each thread: of a smaller load the compiler makes several, in other layouts,
        # and each sees another moment.
        copies = rows[None, :] + 0 * tl.arange(0, 8)[:, None]
        seen = tl.load(  # [8, BLOCK_R]
            running_ptr + copies, mask=row_mask[None, :], other=0.0, volatile=True
        )

    logits = head_logits_tile(
        upper_ptr, upper_weight_ptr, scale_ptr, bias_ptr, rows, row_mask, entries, entry_mask,
        width, code_stride, num_groups, BITS, GROUP,
        EVEN, HAS_BIAS, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
    )  # fmt: skip
    if CONTRAST:
        # not before the product: its clamp would be computed there, waiting ahead of the weights
        alpha = tl.load(alpha_ptr + rows, mask=row_mask, other=1.0)  # [BLOCK_R]
    top = tl.max(logits, 0)  # [BLOCK_R]
    total = tl.sum(tl.exp(logits - top[None, :]), 0)
    place = rows.to(tl.int64) * num_tiles + tile
    field = num_rows.to(tl.int64) * num_tiles
    tl.store(tile_stat_ptr + place, top, mask=row_mask)
    tl.store(tile_stat_ptr + field + place, total, mask=row_mask)

    sampled = tl.max(temperature, 0) > 0
    others = entry_mask[:, None] & row_mask[None, :]
    if EDITED:
        num_words = (vocab + 31) // 32
        word = rows.to(tl.int64) * num_words + tile * BLOCK_V // 32
        lane = (tile * BLOCK_V % 32 + tl.arange(0, BLOCK_V))[:, None]
        edited = tl.load(edited_ptr + word, mask=row_mask, other=0)  # [BLOCK_R]
        allowed = tl.load(allowed_ptr + word, mask=row_mask, other=0)  # [BLOCK_R]
        is_edited = others & ((edited[None, :] >> lane & 1) != 0)
        is_allowed = (allowed[None, :] >> lane & 1) != 0
    if NARROWED:
        top_k = tl.load(top_k_ptr + rows, mask=row_mask, other=0)  # [BLOCK_R]
        unlikely = tl.load(unlikely_ptr + rows, mask=row_mask, other=-1.0)  # [BLOCK_R]
        min_p = tl.load(min_p_ptr + rows, mask=row_mask, other=0.0)  # [BLOCK_R]
        narrows = is_narrowed(top_k, unlikely, min_p, temperature)
    if NARROWED or TOLD:
        is_whole = row_mask & False
        if NARROWED:
            is_whole = narrows
        if TOLD:
            asked = tl.load(asked_ptr + rows, mask=row_mask, other=-1)  # [BLOCK_R]
            is_whole = is_whole | (asked >= 0)
        slots = place[None, :] * BLOCK_V + tl.arange(0, BLOCK_V)[:, None]
        tl.store(candidate_logit_ptr + slots, logits, mask=is_whole[None, :])
    if CONTRAST:
        log_alpha = tl.log(tl.minimum(tl.maximum(alpha, 0.0), 1.0))
        limit = tl.full((BLOCK_R,), float("inf"), tl.float32)
        hot = row_mask & (top >= tl.max(seen, 0) + log_alpha)
        if MIXED:
            hot = hot & (group >= 0)
        if tl.max(hot.to(tl.int32), 0) > 0:
            before = tl.atomic_max(running_ptr + rows, top, mask=hot, sem="relaxed")
            limit = tl.where(hot, tl.maximum(before, top) + log_alpha, limit)
        keep = others & (logits >= limit[None, :])
        live = tl.max(keep.to(tl.int32), 0) > 0
        listed = live
    if EDITED:
        listed = tl.max(is_edited.to(tl.int32), 0) > 0
        if CONTRAST:
            listed = listed | live
    if CONTRAST or EDITED:  # noqa: SIM102 - without either there is no such mask
        if tl.max(listed.to(tl.int32), 0) > 0:
            slots = place[None, :] * BLOCK_V + tl.arange(0, BLOCK_V)[:, None]
            if CONTRAST:
                if tl.max(live.to(tl.int32), 0) > 0:
                    if MIXED:
                        lower = _lower_logits(
                            lower_ptr, upper_weight_ptr, scale_ptr, lower_table_ptr,
                            num_lowers, group, live, keep, bias_ptr, rows, entries, width,
                            code_stride, num_groups, BITS, GROUP,
                            EVEN, HAS_BIAS, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
                        )  # fmt: skip
                    else:
                        lower = tile_logits(
                            lower_ptr, lower_weight_ptr, lower_scale_ptr, rows, row_mask,
                            entries, tl.max(keep.to(tl.int32), 1) > 0,
                            width, code_stride, num_groups, BITS, GROUP,
                            EVEN, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
                        )  # fmt: skip
                    tl.store(candidate_score_ptr + slots, logits - lower, mask=live[None, :])
                kept = keep
                if EDITED:
                    kept = keep | is_edited
            else:
                kept = is_edited
            kept_logits = tl.where(kept, logits, float("-inf"))
            takes = listed
            if NARROWED or TOLD:
                takes = listed & (is_whole == 0)
            tl.store(candidate_logit_ptr + slots, kept_logits, mask=takes[None, :])
            index = tl.atomic_add(count_ptr + rows, 1, mask=listed, sem="relaxed")
            tl.store(listed_ptr + rows * num_tiles + index, tile, mask=listed)
    if CONTRAST:
        below = logits < limit[None, :]
        if NARROWED:
            below = below | narrows[None, :]
        others = others & below
    if EDITED:
        others = others & is_allowed & (is_edited == 0)
    if sampled or MIXED or EDITED or not CONTRAST:
        keys = logits
        if sampled:
            seed = tl.load(seed_ptr + rows, mask=row_mask, other=0)  # [BLOCK_R]
            position = tl.load(position_ptr + rows, mask=row_mask, other=0)  # [BLOCK_R]
            noise = gumbel(seed[None, :], position[None, :], entries[:, None])
            heat = tl.where(temperature > 0, temperature, 1.0)
            is_noisy = temperature > 0
            if NARROWED:
                is_noisy = is_noisy & (narrows == 0)
            noise = tl.where(is_noisy[None, :], noise, 0.0)
            keys = logits / heat[None, :] + noise
        keys = tl.where(others, keys, float("-inf"))
        key, token, value = best_of(keys, logits, entries)
        tl.store(tile_stat_ptr + 2 * field + place, key, mask=row_mask)
        tl.store(tile_stat_ptr + 3 * field + place, value, mask=row_mask)
        tl.store(tile_token_ptr + place, token, mask=row_mask)
        if NARROWED:
            # of nothing but -inf the sum is 0, not NaN
            shares = tl.exp(keys - tl.where(key == float("-inf"), 0.0, key)[None, :])
            tl.store(tile_stat_ptr + 4 * field + place, tl.sum(shares, 0), mask=narrows)
