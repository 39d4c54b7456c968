"""The streaming half of ``products``: a tile of a weight matrix times a block of rows.

Knows nothing of layers: what stands before the product (a norm) and behind it (bias, activation,
residual) are arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multiexit_engine.kernels.activations import activate
from multiexit_engine.kernels.code_tiles import multiplied_codes, multiplied_e4m3
from multiexit_engine.kernels.norms import NORM_ROWS, normalised, row_moments, spread
from multiexit_engine.kernels.overlap import arrive
from multiexit_engine.kernels.row_lists import rows_at


@triton.jit
def multiplied(
    x_ptr,
    weight_ptr,
    gain_ptr,
    shift_ptr,
    rows,
    row_mask,
    entries,
    entry_mask,
    start,
    stop,
    width,
    x_stride,
    eps,
    NORM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BLOCK_V, BLOCK_R] float32 sums over the columns ``start`` to ``stop - 1``, in their order.

    Masked rows and entries are not read and give 0. NORM is "none", or "layer" or "rms" of the rows
    from the first on, at most NORM_ROWS.
    """
    columns = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + entries.to(tl.int64)[:, None] * width + columns[None, :]
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    total = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    if NORM != "none":
        tl.static_assert(BLOCK_R >= NORM_ROWS)
        lanes = tl.arange(0, NORM_ROWS)
        is_row = lanes < tl.sum(row_mask.to(tl.int32), 0)
        center, scale = row_moments(x_ptr, lanes, is_row, width, x_stride, eps, NORM == "layer")
        center, scale = spread(center, BLOCK_R), spread(scale, BLOCK_R)
    for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        inside = k + columns < stop
        weight_mask = entry_mask[:, None]
        x_mask = row_mask[:, None]
        if not EVEN:
            weight_mask = weight_mask & inside[None, :]
            x_mask = x_mask & inside[None, :]
        weight = tl.load(  # [BLOCK_V, BLOCK_K]
            weight_ptrs + k, mask=weight_mask, other=0.0, eviction_policy="evict_first"
        )
        x = tl.load(x_ptrs + k, mask=x_mask, other=0.0)  # [BLOCK_R, BLOCK_K]
        if NORM == "none":
            x = x.to(weight.dtype)
        else:
            gain = tl.load(gain_ptr + k + columns, mask=inside, other=0.0)  # [BLOCK_K]
            shift = gain
            if NORM == "layer":
                shift = tl.load(shift_ptr + k + columns, mask=inside, other=0.0)
            x = normalised(x, center, scale, gain, shift, NORM == "layer").to(weight.dtype)
        if weight.dtype == tl.float32:
            total = tl.dot(weight, x.T, total, input_precision="ieee")
        else:
            total = tl.dot(weight, x.T, total)
    return total


@triton.jit
def joined(
    total,
    partial_ptr,
    ticket_ptr,
    part,
    turn,
    SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sum of all parts of a tile, in their order, and whether this program has it.

    Only the one that arrives last has; it leaves the ticket ``turn`` as it was found.
    """
    cells = tl.arange(0, BLOCK_V)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    first = partial_ptr + turn.to(tl.int64) * SPLITS * BLOCK_V * BLOCK_R
    tl.store(first + part * BLOCK_V * BLOCK_R + cells, total)
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket_ptr + turn, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(ticket_ptr + turn, 0)
        total = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
        # unrolled, so that as many parts are on their way at once as registers hold
        for other in tl.range(0, SPLITS, loop_unroll_factor=16 if BLOCK_R <= 32 else 4):
            place = first + other * BLOCK_V * BLOCK_R + cells
            total += tl.load(place, cache_modifier=".cg")  # [BLOCK_V, BLOCK_R]
    return total, is_last


@triton.jit(do_not_specialize=["num_rows", "out_features", "ahead_bytes"])
def product_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    residual_ptr,
    output_ptr,
    partial_ptr,
    ticket_ptr,
    row_ptr,
    count_ptr,
    ahead_ptr,
    ahead_bytes,
    num_rows,
    out_features,
    width,
    split_width,
    x_stride,
    code_stride,
    num_groups,
    eps,
    LISTED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of outputs for one block of rows, over one part of the columns.

    GATED: the first half of a tile are gates, the other the numbers that they let through;
    ``out_features`` counts what comes out. LISTED: the rows are those of a list, in ``x`` as in the
    output; a block that the list does not reach reads no weight. BITS: of the codes of a quantized
    matrix, whose GROUP columns share a scale; 0 for a plain one. Codes of rows that have one scale,
    with GROUP 0, are numbers in e4m3.
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
    if GATED:
        HALF: tl.constexpr = BLOCK_V // 2
        outs = tile * HALF + lanes % HALF
        entry_mask = outs < out_features
        entries = outs + tl.where(lanes < HALF, 0, out_features)
    else:
        entries = tile * BLOCK_V + lanes
        entry_mask = entries < out_features
    start = part * split_width
    stop = tl.minimum(start + split_width, width)
    if BITS == 0:
        total = multiplied(
            x_ptr, weight_ptr, gain_ptr, shift_ptr, rows, row_mask, entries, entry_mask,
            start, stop, width, x_stride, eps,
            NORM, EVEN, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
        )  # fmt: skip
    elif GROUP == 0:
        total = multiplied_e4m3(
            x_ptr, weight_ptr, scale_ptr, rows, row_mask, entries, entry_mask,
            start, stop, code_stride, x_stride, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        total = multiplied_codes(
            x_ptr, weight_ptr, scale_ptr, rows, row_mask, entries, entry_mask,
            start, stop, width, code_stride, num_groups, x_stride,
            BITS, GROUP, BLOCK_V, BLOCK_R, STAGES,
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
    if GATED:
        halves = tl.permute(tl.reshape(total, (2, HALF, BLOCK_R)), (1, 2, 0))
        gate, through = tl.split(halves)
        total = activate(gate, FORM) * through
        outs = tile * HALF + tl.arange(0, HALF)
    else:
        total = activate(total, FORM)
        outs = entries
    mask = (outs < out_features)[:, None] & row_mask[None, :]
    cells = rows.to(tl.int64)[None, :] * out_features + outs[:, None]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + cells, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + cells, total.to(output_ptr.dtype.element_ty), mask=mask)
