"""LayerNorm and RMSNorm: their statistics for any kernel, and one launch for a norm alone.

Knows nothing of what reads the normalised rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.launch import INTERPRETED, options
from multiexit_engine.kernels.overlap import arrive, overlapped
from multiexit_engine.kernels.row_lists import RowList, rows_at

# The tile in which every kernel sums a row, so that all of them find the same bits: few rows, as
# masked ones cost what others do; many columns, as each step waits for its loads.
NORM_ROWS = tl.constexpr(4)
NORM_COLUMNS = tl.constexpr(256)
_NUM_WARPS = 4
# The interpreter runs programs one after the other; the tile, and so every bit, is the same.
_PROGRAMS = 1 if INTERPRETED else 512


@triton.jit
def row_moments(x_ptr, rows, row_mask, width, stride, eps, IS_LAYER: tl.constexpr):
    """Means (0 for RMSNorm) and reciprocal deviations of NORM_ROWS rows, in one pass.

    A lane of columns has a running mean and sum of squared deviations, which are joined in the
    end: nothing cancels, however far a row is from 0.

    Source: Welford 1962, Technometrics 4(3); joined as Chan, Golub and LeVeque 1983, eq. 2.1.
    """
    columns = tl.arange(0, NORM_COLUMNS)
    places = x_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mean = tl.zeros((NORM_ROWS, NORM_COLUMNS), tl.float32)
    squares = tl.zeros((NORM_ROWS, NORM_COLUMNS), tl.float32)
    step = 0.0
    for k in tl.range(0, width, NORM_COLUMNS, num_stages=4):
        mask = row_mask[:, None] & (k + columns < width)[None, :]
        x = tl.load(places + k, mask=mask, other=0.0).to(tl.float32)
        if IS_LAYER:
            step += 1.0
            delta = x - mean
            mean += tl.where(mask, delta / step, 0.0)
            squares += tl.where(mask, delta * (x - mean), 0.0)
        else:
            squares += x * x
    if IS_LAYER:
        counts = ((width - columns + NORM_COLUMNS - 1) // NORM_COLUMNS).to(tl.float32)[None, :]
        center = tl.sum(mean * counts, 1) / width
        offset = mean - center[:, None]
        squares += offset * offset * counts
    else:
        center = tl.zeros((NORM_ROWS,), tl.float32)
    return center, tl.rsqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def spread(moments, BLOCK_R: tl.constexpr):
    """[BLOCK_R] numbers that begin with those of NORM_ROWS rows; the others repeat them."""
    lanes = tl.arange(0, BLOCK_R)[:, None] % NORM_ROWS
    mine = lanes == tl.arange(0, NORM_ROWS)[None, :]
    return tl.sum(tl.where(mine, moments[None, :], 0.0), 1)


@triton.jit
def normalised(x, center, scale, gain, shift, IS_LAYER: tl.constexpr):
    """[rows, columns] float32 of rows and their moments."""
    x = (x.to(tl.float32) - center[:, None]) * scale[:, None] * gain.to(tl.float32)[None, :]
    if IS_LAYER:
        x += shift.to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def norm_kernel(
    x_ptr,
    gain_ptr,
    shift_ptr,
    output_ptr,
    rounded_ptr,
    row_ptr,
    count_ptr,
    num_rows,
    rows_each,
    width,
    x_stride,
    eps,
    LISTED: tl.constexpr,
    IS_LAYER: tl.constexpr,
    ROUNDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``rows_each`` rows of the tile's four, the others masked; the output may be x.

    ROUNDED: the result is written once more, in another type.
    """
    arrive(None, 0, OVERLAP)
    if LISTED:  # noqa: SIM102 - without a list there is no count
        if tl.program_id(0) * rows_each >= tl.load(count_ptr):
            return
    lanes = tl.arange(0, NORM_ROWS)
    places = tl.program_id(0) * rows_each + lanes
    rows, row_mask = rows_at(places, row_ptr, count_ptr, num_rows, LISTED)
    row_mask = row_mask & (lanes < rows_each)
    center, scale = row_moments(x_ptr, rows, row_mask, width, x_stride, eps, IS_LAYER)
    columns = tl.arange(0, NORM_COLUMNS)
    row = rows.to(tl.int64)[:, None]
    for k in range(0, width, NORM_COLUMNS):
        inside = k + columns < width
        mask = row_mask[:, None] & inside[None, :]
        x = tl.load(x_ptr + row * x_stride + (k + columns)[None, :], mask=mask, other=0.0)
        gain = tl.load(gain_ptr + k + columns, mask=inside, other=0.0)  # [NORM_COLUMNS]
        shift = gain
        if IS_LAYER:
            shift = tl.load(shift_ptr + k + columns, mask=inside, other=0.0)
        x = normalised(x, center, scale, gain, shift, IS_LAYER)
        target = output_ptr + row * width + (k + columns)[None, :]
        tl.store(target, x.to(output_ptr.dtype.element_ty), mask=mask)
        if ROUNDED:
            again = rounded_ptr + row * width + (k + columns)[None, :]
            tl.store(again, x.to(rounded_ptr.dtype.element_ty), mask=mask)


def norm(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    listed: RowList | None = None,
    output: Tensor | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """[rows, width] in ``dtype``: LayerNorm with a shift, RMSNorm without. One launch.

    Of ``listed`` rows only, where there is a list; into ``output``, which may be x, where given,
    and once more into ``rounded``, of another type, where given.
    """
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    if output is None:
        output = torch.empty(rows, width, dtype=dtype, device=x.device)
    if rows:
        rows_each = min(NORM_ROWS.value, triton.cdiv(rows, _PROGRAMS))
        norm_kernel[(triton.cdiv(rows, rows_each),)](
            x, gain, shift, output, rounded,
            *((None, None) if listed is None else (listed.rows, listed.count)),
            rows, rows_each, width, x.stride(0), eps,
            LISTED=listed is not None, IS_LAYER=shift is not None, ROUNDED=rounded is not None,
            **options(_NUM_WARPS), **overlapped(x.device),
        )  # fmt: skip
    return output


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See ``multiexit_engine.ops.norm``. One launch."""
    return norm(x, weight, bias, eps, x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``multiexit_engine.ops.norm``. One launch; rounds once."""
    return norm(x.reshape(-1, x.shape[-1]), weight, None, eps, x.dtype).view(x.shape)
