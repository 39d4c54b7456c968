"""Weight matrices as launches are given them: plain ones, and codes with scales.

Knows nothing of what is multiplied with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Loads in flight of codes, of which a step has few.
CODE_STAGES = 8
# The same of numbers of 8 bits, whose steps are those of plain matrices and half as many bytes.
FLOAT_STAGES = 6


class Codes(Protocol):
    """A quantized matrix, as ``multiexit_engine.quantization`` describes it."""

    @property
    def codes(self) -> Tensor: ...

    @property
    def scales(self) -> Tensor: ...

    @property
    def quantization(self) -> Any: ...

    @property
    def shape(self) -> torch.Size: ...


Matrix = Tensor | Codes


class SpanOfCodes(NamedTuple):
    """Rows of a quantized matrix, side by side in it."""

    codes: Tensor
    scales: Tensor
    columns: int
    quantization: Any

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], self.columns))


class Stored(NamedTuple):
    """What lies in memory.

    Attributes:
        numbers: [rows, columns], or codes of a row after each other.
        scales: [rows, groups] of codes, or None.
        bits: of a code; 0 of a plain matrix.
        group: columns that share a scale; 0 where codes are numbers in e4m3 with one for a row.
    """

    numbers: Tensor
    scales: Tensor | None = None
    bits: int = 0
    group: int = 0

    @property
    def strides(self) -> tuple[int, int]:
        """Between rows: of the numbers, and of the scales."""
        return self.numbers.stride(0), 0 if self.scales is None else self.scales.stride(0)

    @property
    def constants(self) -> dict[str, int]:
        """As kernels are told."""
        return {"BITS": self.bits, "GROUP": self.group}

    def stages(self, plain: int) -> int:
        """Loads in flight, where a plain matrix has ``plain``."""
        if not self.bits:
            return plain
        return CODE_STAGES if self.group else FLOAT_STAGES


def row_span(weight: Matrix, start: int, stop: int) -> Matrix:
    """A view of the rows ``start`` to ``stop - 1``."""
    if isinstance(weight, Tensor):
        return weight[start:stop]
    codes, scales = weight.codes[start:stop], weight.scales[start:stop]
    return SpanOfCodes(codes, scales, weight.shape[1], weight.quantization)


def stored(weight: Matrix) -> Stored:
    """A weight as a launch is given it."""
    if isinstance(weight, Tensor):
        return Stored(weight)
    kind = weight.quantization
    return Stored(weight.codes, weight.scales, kind.bits, kind.group_size)
