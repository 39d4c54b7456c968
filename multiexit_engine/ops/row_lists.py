"""Lists of rows that the device makes and nobody waits for, and what is computed of such rows.

Backends compute nothing of rows that are not listed, and a weight for none of them is not read.
Knows nothing of why a row is listed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multiexit_engine.ops.heads import HeadStatistics, head_statistics
from multiexit_engine.ops.linear import linear
from multiexit_engine.ops.operands import is_dense_or_coded
from multiexit_engine.ops.registry import register_op
from multiexit_engine.quantization import Weight


@dataclass(frozen=True, eq=False)
class RowList:
    """Some of the rows of a tensor, as the device alone knows them.

    Attributes:
        rows: [all rows] int32, of which the first ``before[-1]`` are listed, ascending; the others
            mean nothing.
        before: [all rows + 1] int32, how many rows before each are listed.
    """

    rows: Tensor
    before: Tensor

    @property
    def count(self) -> Tensor:
        """[1] int32, how many are listed."""
        return self.before[-1:]

    def index(self) -> Tensor:
        """[listed] int64; waits for the device, so it is for references."""
        return self.rows[: int(self.count)].long()

    def marks(self) -> Tensor:
        """[all rows] bool, whether each is listed."""
        return self.before[1:] > self.before[:-1]


@register_op
def compact_rows(is_listed: Tensor) -> RowList:
    """List the rows that are marked, in their order. The host does not wait.

    Args:
        is_listed: [rows] bool, at least one row.

    Returns:
        RowList of the marked rows.

    Source: stream compaction by prefix sums, Blelloch 1990, CMU-CS-90-190, section 1.4.
    """
    num_rows, device = is_listed.shape[0], is_listed.device
    before = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(is_listed, 0, dtype=torch.int32, out=before[1:])
    # rows that are not listed share a place behind all others
    places = torch.where(is_listed, before[:-1], num_rows).long()
    rows = torch.empty(num_rows + 1, dtype=torch.int32, device=device)
    rows[places] = torch.arange(num_rows, dtype=torch.int32, device=device)
    return RowList(rows[:-1], before)


@register_op
def listed_linear(x: Tensor, weight: Weight, bias: Tensor | None, listed: RowList) -> Tensor:
    """``linear`` of the listed rows.

    On a GPU a listed row has the bits that it has in ``linear`` among few rows, whoever else is
    listed.

    Args:
        x: [rows, in_features]; rows that are not listed are not read.
        weight: [out_features, in_features], may be quantized.
        bias: [out_features] or None.
        listed: some of the rows.

    Returns:
        [rows, out_features] in the dtype of ``x``; rows that are not listed mean nothing.

    Source: ``torch.nn.functional.linear``.
    """
    index = listed.index()
    output = x.new_full((x.shape[0], weight.shape[0]), torch.nan)
    output[index] = linear.reference(x[index], weight, bias)
    return output


@register_op
def listed_head_statistics(
    hidden: Tensor, weight: Weight, bias: Tensor | None, listed: RowList
) -> HeadStatistics:
    """``head_statistics`` of the listed rows.

    Args:
        hidden: [rows, hidden_size]; rows that are not listed are not read.
        weight: [vocab, hidden_size] of the same dtype and device, or quantized.
        bias: [vocab] added to every row's logits, or None.
        listed: some of the rows.

    Returns:
        HeadStatistics, [rows] each; rows that are not listed mean nothing.

    Source: as ``head_statistics``.
    """
    # of all rows: to leave others out, the host would have to wait to be told which
    return head_statistics.reference(hidden, weight, bias)


compact_rows.backend("triton", "multiexit_engine.kernels.row_lists:compact_rows", device="cuda")
listed_linear.backend(
    "triton",
    "multiexit_engine.kernels.ragged_blocks:listed_linear",
    device="cuda",
    supports=lambda x, weight, bias, listed: is_dense_or_coded([x], [weight]),
)
listed_head_statistics.backend(
    "triton",
    "multiexit_engine.kernels.head_statistics:listed_head_statistics",
    device="cuda",
    supports=lambda hidden, weight, bias, listed: is_dense_or_coded([hidden], [weight]),
)
