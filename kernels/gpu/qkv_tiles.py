"""Queries, keys and values of a layer in one product, turned and stored where attention reads them.

Knows nothing of who owns a cache block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multiexit_engine.kernels.overlap import arrive
from multiexit_engine.kernels.product_tiles import joined, multiplied
from multiexit_engine.kernels.row_lists import rows_at


@triton.jit
def _store(
    numbers,
    entries,
    rows,
    mask,
    slots,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    query_width,
    kv_width,
):
    """[entries, rows]: queries row by row, keys and values in the slots of their rows."""
    dtype = query_ptr.dtype.element_ty
    outs = entries[:, None]
    numbers = numbers.to(dtype)
    queries = rows.to(tl.int64)[None, :] * query_width + outs
    tl.store(query_ptr + queries, numbers, mask=mask & (outs < query_width))
    places = slots[None, :] * kv_width + outs - query_width
    is_key = (outs >= query_width) & (outs < query_width + kv_width)
    tl.store(key_cache_ptr + places, numbers, mask=mask & is_key)
    is_value = outs >= query_width + kv_width
    tl.store(value_cache_ptr + places - kv_width, numbers, mask=mask & is_value)


@triton.jit(do_not_specialize=["num_rows", "ahead_bytes"])
def qkv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    partial_ptr,
    ticket_ptr,
    row_ptr,
    count_ptr,
    ahead_ptr,
    ahead_bytes,
    num_rows,
    query_width,
    kv_width,
    width,
    split_width,
    x_stride,
    eps,
    LISTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of outputs for one block of rows, over one part of the columns.

    ROTARY: the first half of a tile are entries of the first halves of heads, the other half their
    partners, so that a pair is turned where it is made. LISTED: the rows are those of a list; a
    block that the list does not reach reads no weight.
    """
    arrive(ahead_ptr, ahead_bytes, OVERLAP)
    part = tl.program_id(0)
    tile = tl.program_id(1)
    block = tl.program_id(2)
    if LISTED:  # noqa: SIM102 - without a list there is no count
        if block * BLOCK_R >= tl.load(count_ptr):
            return
    places = block * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, row_mask = rows_at(places, row_ptr, count_ptr, num_rows, LISTED)
    lanes = tl.arange(0, BLOCK_V)
    out_features = query_width + 2 * kv_width
    HALF: tl.constexpr = HEAD_DIM // 2
    PAIRS: tl.constexpr = BLOCK_V // 2
    if ROTARY:
        pairs = tile * PAIRS + lanes % PAIRS
        entry_mask = pairs < out_features // 2
        entries = pairs // HALF * HEAD_DIM + pairs % HALF + tl.where(lanes < PAIRS, 0, HALF)
    else:
        entries = tile * BLOCK_V + lanes
        entry_mask = entries < out_features
    start = part * split_width
    total = multiplied(
        x_ptr, weight_ptr, gain_ptr, shift_ptr, rows, row_mask, entries, entry_mask,
        start, tl.minimum(start + split_width, width), width, x_stride, eps,
        NORM, EVEN, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
    )  # fmt: skip
    if SPLITS > 1:
        turn = block * tl.num_programs(1) + tile
        total, is_last = joined(
            total, partial_ptr, ticket_ptr, part, turn, SPLITS, BLOCK_V, BLOCK_R
        )
        if not is_last:
            return
    if HAS_BIAS:
        bias = tl.load(bias_ptr + entries, mask=entry_mask, other=0.0)  # [BLOCK_V]
        total += bias.to(tl.float32)[:, None]
    slots = tl.load(slot_ptr + rows, mask=row_mask, other=0)  # [BLOCK_R]
    if ROTARY:
        pairs = tile * PAIRS + tl.arange(0, PAIRS)
        entries = pairs // HALF * HEAD_DIM + pairs % HALF
        mask = (pairs < out_features // 2)[:, None] & row_mask[None, :]
        first, second = tl.split(
            tl.permute(tl.reshape(total, (2, PAIRS, BLOCK_R)), (1, 2, 0))
        )  # [PAIRS, BLOCK_R] each
        positions = tl.load(position_ptr + rows, mask=row_mask, other=0)  # [BLOCK_R]
        angles = positions[None, :] * HALF + (pairs % HALF)[:, None]
        is_turned = mask & (entries < query_width + kv_width)[:, None]
        cos = tl.load(cos_ptr + angles, mask=is_turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles, mask=is_turned, other=0.0).to(tl.float32)
        _store(
            first * cos - second * sin, entries, rows, mask, slots,
            query_ptr, key_cache_ptr, value_cache_ptr, query_width, kv_width,
        )  # fmt: skip
        _store(
            second * cos + first * sin, entries + HALF, rows, mask, slots,
            query_ptr, key_cache_ptr, value_cache_ptr, query_width, kv_width,
        )  # fmt: skip
    else:
        mask = entry_mask[:, None] & row_mask[None, :]
        _store(
            total, entries, rows, mask, slots,
            query_ptr, key_cache_ptr, value_cache_ptr, query_width, kv_width,
        )  # fmt: skip
