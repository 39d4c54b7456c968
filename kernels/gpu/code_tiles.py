"""A tile of a quantized weight matrix times a block of rows, dequantized on the way.

Codes are exact in any float type and a group's scale is applied to its float32 sum, so nothing is
rounded that a product with the dequantized matrix would not round.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(codes, x):
    """[entries, rows] float32."""
    codes = codes.to(x.dtype)
    if x.dtype == tl.float32:
        return tl.dot(codes, x.T, input_precision="ieee")
    return tl.dot(codes, x.T)


@triton.jit
def _codes(code_ptr, entries, entry_mask, code_stride, first, stop, BYTES: tl.constexpr):
    """[entries, BYTES] of rows of codes from byte ``first`` on; 0 from byte ``stop`` on."""
    lanes = tl.arange(0, BYTES)
    ptrs = code_ptr + entries.to(tl.int64)[:, None] * code_stride + lanes[None, :]
    mask = entry_mask[:, None] & (first + lanes < stop)[None, :]
    return tl.load(ptrs + first, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _numbers(x_ptr, rows, row_mask, x_stride, columns, first, stop):
    """[rows, columns] of ``x`` from column ``first`` on; 0 from column ``stop`` on."""
    ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    mask = row_mask[:, None] & (first + columns < stop)[None, :]
    return tl.load(ptrs + first, mask=mask, other=0.0)


@triton.jit
def multiplied_codes(
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    row_mask,
    entries,
    entry_mask,
    start,
    stop,
    width,
    code_stride,
    num_groups,
    x_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BLOCK_V, BLOCK_R] float32 sums over the columns ``start`` to ``stop - 1``, group by group.

    ``start`` is a multiple of GROUP; masked rows and entries are not read and give 0. Of 4 bits a
    byte holds two columns of a block of 32: i in the low half and 16 + i in the high one.
    """
    BYTES: tl.constexpr = GROUP * BITS // 8
    columns = tl.arange(0, BYTES)
    if BITS == 4:
        columns = columns // 16 * 32 + columns % 16
    scale_ptrs = scale_ptr + entries.to(tl.int64) * num_groups
    total = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    for k in tl.range(start, stop, GROUP, num_stages=STAGES):
        first = k * BITS // 8
        codes = _codes(code_ptr, entries, entry_mask, code_stride, first, code_stride, BYTES)
        scale = tl.load(scale_ptrs + k // GROUP, mask=entry_mask, other=0.0)  # [BLOCK_V]
        x = _numbers(x_ptr, rows, row_mask, x_stride, columns, k, stop)  # [BLOCK_R, BYTES]
        if BITS == 8:
            sums = _dot(codes, x)
        else:
            high = _numbers(x_ptr, rows, row_mask, x_stride, columns, k + 16, stop)
            sums = _dot((codes & 15).to(tl.int8) - 8, x) + _dot((codes >> 4).to(tl.int8) - 8, high)
        total += sums * scale.to(tl.float32)[:, None]
    return total


@triton.jit
def e4m3_halves(codes):
    """float16 numbers that are 2**-8 of what codes of e4m3 mean, exactly; of NaN they are numbers.

    Integers alone, as compute capability 8.0 has no conversion: shifted to where float16 has its
    exponent and mantissa, a number differs by the biases of exponents (7 and 15), those without a
    leading 1 too.
    """
    wide = codes.to(tl.int16)
    return (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def multiplied_e4m3(
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    row_mask,
    entries,
    entry_mask,
    start,
    stop,
    code_stride,
    x_stride,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BLOCK_V, BLOCK_R] float32 sums over the columns ``start`` to ``stop - 1``, in their order.

    A row of the matrix has one scale. Masked rows and entries are not read and give 0.
    """
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)
    for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        codes = _codes(code_ptr, entries, entry_mask, code_stride, k, stop, BLOCK_K)
        x = _numbers(x_ptr, rows, row_mask, x_stride, columns, k, stop)  # [BLOCK_R, BLOCK_K]
        numbers = e4m3_halves(codes)
        if x.dtype == tl.float32:
            total = tl.dot(numbers.to(tl.float32), x.T, total, input_precision="ieee")
        else:
            total = tl.dot(numbers.to(x.dtype), x.T, total)
    scale = tl.load(scale_ptr + entries, mask=entry_mask, other=0.0)  # [BLOCK_V]
    return total * (scale.to(tl.float32) * 256.0)[:, None]
