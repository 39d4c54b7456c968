"""Weights as codes of few bits with a scale for each group: the data, and the rules that make it.

Knows nothing of checkpoints or of who multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (8, 4)
GROUP_SIZES = (32, 64)
# Of e4m3 (4 bits of exponent, 3 of mantissa, no infinity): its largest number.
LARGEST_FLOAT = 448
# Columns whose 4-bit codes lie together: byte i holds column i and column 16 + i.
BLOCK = 32
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Quantization:
    """How weight matrices are stored.

    Attributes:
        bits: of a code, 8 or 4.
        group_size: columns that share a scale, 32 or 64. The last group of a row takes what is
            left, so any number of columns will do. 0 where a row has one scale, as fp8 has: its
            numbers have exponents of their own.
        is_float: whether codes are numbers in e4m3, else they are integers.
    """

    bits: int
    group_size: int = 32
    is_float: bool = False

    def __post_init__(self) -> None:
        if self.is_float:
            if (self.bits, self.group_size) != (8, 0):
                raise ValueError(f"{self!r}: numbers have bits=8 and group_size=0")
        elif self.bits not in BITS or self.group_size not in GROUP_SIZES:
            raise ValueError(f"{self!r}: bits must be in {BITS} and group_size in {GROUP_SIZES}")

    @classmethod
    def parse(cls, name: str) -> Quantization:
        """``"int8"``, ``"int4"``, with a group size ``"int4-g64"``, ``"fp8"``; else ValueError."""
        known = {str(cls(bits, size)): cls(bits, size) for bits in BITS for size in GROUP_SIZES}
        known |= {f"int{bits}": cls(bits) for bits in BITS}
        known["fp8"] = cls(8, 0, is_float=True)
        if name not in known:
            raise ValueError(f"quantization={name!r}: must be None, " + ", ".join(sorted(known)))
        return known[name]

    def __str__(self) -> str:
        return "fp8" if self.is_float else f"int{self.bits}-g{self.group_size}"

    @property
    def largest_code(self) -> int:
        """127, 7 or 448; what codes mean lies in -largest_code..largest_code."""
        return LARGEST_FLOAT if self.is_float else int(2 ** (self.bits - 1)) - 1

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a quantized matrix."""
        row = _padded(columns, BLOCK) * self.bits // 8
        return rows * (row + -(-columns // self.group_of(columns)) * 2)

    def group_of(self, columns: int) -> int:
        """Columns that share a scale, in a matrix of so many."""
        return self.group_size or _padded(columns, BLOCK)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix [rows, columns]: what a code means times the scale of its group.

    Attributes:
        codes: [rows, columns, padded to a multiple of 32] int8, or half as many uint8 for 4 bits:
            of each block of 32 columns byte i holds columns i (low half) and 16 + i (high half) as
            code + 8. Padding is the code 0. Of fp8 uint8, the bits of e4m3, never those of NaN.
        scales: [rows, groups] bfloat16.
        columns: without padding.
        quantization: bits and group size.
    """

    codes: Tensor
    scales: Tensor
    columns: int
    quantization: Quantization

    @property
    def shape(self) -> torch.Size:
        """[rows, columns] of the matrix that this stands for."""
        return torch.Size((self.codes.shape[0], self.columns))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


Weight = Tensor | QuantizedWeight


def quantize(weight: Tensor, quantization: Quantization) -> QuantizedWeight:
    """The nearest codes of a matrix, group by group along its columns.

    The scale of a group is max |w| / largest_code, rounded to bfloat16; a code is w / scale,
    rounded to the nearest, ties to even, so no number is off by more than half a scale (of fp8 by
    more than 1/16 of itself, or 1/1024 of the scale). Symmetric: there is no zero point.

    bfloat16, not float16, because it has float32's range: a float16 scale of numbers below 0.008
    has too few bits, one of numbers below 4e-6 none. What the rounding of a scale changes is the
    width of the steps, by at most 0.2 %.

    Args:
        weight: [rows, columns] on the CPU, any float dtype; computed in float32.
        quantization: bits and group size.

    Raises:
        ValueError: a number is not finite.

    Source: round-to-nearest absmax of Dettmers et al. 2022, arXiv:2208.07339, section 2.1, by group
        as Yao et al. 2022, arXiv:2206.01861; e4m3 of Micikevicius et al. 2022, arXiv:2209.05433.
    """
    parts = [_quantize_rows(part, quantization) for part in torch.split(weight, _ROWS_AT_ONCE)]
    codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    return QuantizedWeight(codes, scales, weight.shape[1], quantization)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, columns] of the numbers that a quantized matrix stands for, exact in float32."""
    codes = weight.codes
    if weight.quantization.bits == 4:
        halves = codes.view(codes.shape[0], -1, 1, BLOCK // 2)
        codes = torch.cat((halves & 15, halves >> 4), 2).flatten(1).to(torch.int8) - 8
    if weight.quantization.is_float:
        codes = codes.view(torch.float8_e4m3fn)
    size = weight.quantization.group_of(weight.columns)
    scales = weight.scales.to(dtype).repeat_interleave(size, 1)[:, : weight.columns]
    return codes[:, : weight.columns].to(dtype) * scales


def as_tensor(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix itself in ``dtype``, dequantized where it needs to be."""
    return dequantize(weight, dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def row_span(weight: Weight, start: int, stop: int) -> Weight:
    """A view of the rows ``start`` to ``stop - 1`` of a matrix, which has them."""
    if not isinstance(weight, QuantizedWeight):
        return weight[start:stop]
    return QuantizedWeight(
        weight.codes[start:stop], weight.scales[start:stop], weight.columns, weight.quantization
    )


def first_rows(weight: Weight, rows: int) -> Weight:
    """A view of the first rows of a matrix; ValueError where it has not so many, or for none."""
    if not 1 <= rows <= weight.shape[0]:
        raise ValueError(
            f"{rows} rows of a matrix: it has {weight.shape[0]}, take 1 to all of them"
        )
    return row_span(weight, 0, rows)


def _quantize_rows(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    size, largest = quantization.group_of(columns), quantization.largest_code
    groups = _zero_padded(weight.float(), _padded(columns, size)).view(rows, -1, size)
    scales = (groups.abs().amax(-1, keepdim=True) / largest).bfloat16()
    if not bool(scales.isfinite().all()):
        raise ValueError("a weight is NaN or infinite: it cannot be quantized")
    wide = scales.float()
    codes = (groups / wide.masked_fill(wide == 0, torch.inf)).view(rows, -1)[:, :columns]
    if quantization.is_float:
        # past the largest number there is only NaN
        numbers = codes.clamp_(-largest, largest).to(torch.float8_e4m3fn)
        return _zero_padded(numbers.view(torch.uint8), _padded(columns, BLOCK)), scales[..., 0]
    codes = codes.round_().clamp_(-largest, largest).to(torch.int8)
    codes = _zero_padded(codes, _padded(columns, BLOCK))
    if quantization.bits == 4:
        halves = (codes + 8).to(torch.uint8).view(rows, -1, 2, BLOCK // 2)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    return codes, scales[..., 0]


def _padded(columns: int, size: int) -> int:
    return -(-columns // size) * size


def _zero_padded(matrix: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))
