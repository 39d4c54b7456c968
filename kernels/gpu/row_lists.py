"""Lists of rows that only the device knows: how they are made, and how kernels read them.

A list has room for all rows and says itself how many it holds, so grids are made for all of them
and programs that find nothing to do end before they read a weight. Knows nothing of why a row is
listed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.launch import options

_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class RowList:
    """The fields of the op's result, which kernels do not know.

    Attributes:
        rows: [all rows] int32, of which the first ``before[-1]`` are listed, ascending.
        before: [all rows + 1] int32, how many rows before each are listed.
    """

    rows: Tensor
    before: Tensor

    @property
    def count(self) -> Tensor:
        """[1] int32."""
        return self.before[-1:]

    def marks(self) -> Tensor:
        """[all rows] bool, whether each is listed."""
        return self.before[1:] > self.before[:-1]


def compact_rows(is_listed: Tensor) -> RowList:
    """See ``multiexit_engine.ops.row_lists``. One launch of one program."""
    num_rows = is_listed.shape[0]
    rows = torch.empty(num_rows, dtype=torch.int32, device=is_listed.device)
    before = torch.empty(num_rows + 1, dtype=torch.int32, device=is_listed.device)
    flags = is_listed.contiguous().view(torch.uint8)
    compact_kernel[(1,)](flags, rows, before, num_rows, BLOCK=_BLOCK, **options(4))
    return RowList(rows, before)


@triton.jit(do_not_specialize=["num_rows"])
def compact_kernel(flag_ptr, row_ptr, before_ptr, num_rows, BLOCK: tl.constexpr):
    """A prefix sum of all flags, and each listed row at its place."""
    count = 0
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < num_rows
        flag = tl.load(flag_ptr + rows, mask=inside, other=0).to(tl.int32)  # [BLOCK]
        place = count + tl.cumsum(flag, 0) - flag
        tl.store(before_ptr + rows, place, mask=inside)
        tl.store(row_ptr + place, rows, mask=inside & (flag > 0))
        count += tl.sum(flag, 0)
    tl.store(before_ptr + num_rows, count)


@triton.jit
def rows_at(places, row_ptr, count_ptr, num_rows, LISTED: tl.constexpr):
    """The rows at some places, and which of the places hold one: of a list, or of all rows."""
    if LISTED:
        mask = places < tl.load(count_ptr)
        rows = tl.load(row_ptr + places, mask=mask, other=0)
    else:
        mask = places < num_rows
        rows = places
    return rows, mask
