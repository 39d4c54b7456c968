"""The parts that blocks over a cache and blocks over packed texts have in common.

Reads modules by the names of their parts and imports none of their classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from multiexit_engine.kernels.matrices import Matrix
from multiexit_engine.kernels.norms import norm as norm_rows
from multiexit_engine.kernels.products import Norm, product
from multiexit_engine.kernels.row_lists import RowList


class Stream(NamedTuple):
    """The residual stream between two parts of blocks.

    Attributes:
        states: [rows, hidden] float32.
        read: the same for products that no norm stands before; see ``read_type``.
    """

    states: Tensor
    read: Tensor

    @classmethod
    def entering(cls, hidden: Tensor, block: Any) -> Stream:
        """What a span of blocks begins with, of which this is the first."""
        states, dtype = hidden.float().contiguous(), read_type(block)
        return cls(states, states if dtype is None else states.to(dtype))

    def taken(self, rows: Tensor) -> Stream:
        """Some rows, [n] int64."""
        states = self.states[rows]
        return Stream(states, states if self.read is self.states else self.read[rows])

    def replaced(self, rows: Tensor, own: Stream) -> Stream:
        """The stream with others in the place of some rows."""
        states = self.states.index_copy(0, rows, own.states)
        if self.read is self.states:
            return Stream(states, states)
        return Stream(states, self.read.index_copy(0, rows, own.read))


def read_type(block: Any) -> torch.dtype | None:
    """What rows are rounded to that meet a block's codes with no norm before; None for none.

    A product with codes takes the type of its rows. The norm behind a part rounds them, so that
    none of the programs that read them has to.
    """
    if not block.is_post_norm or isinstance(block.attention.qkv.weight, Tensor):
        return None
    dtype: torch.dtype = block.attention_norm.weight.dtype
    return None if dtype == torch.float32 else dtype


class PartNorm:
    """The norm of one part of a block, where it stands."""

    def __init__(self, block: Any, module: Any) -> None:
        own = Norm(module.weight, getattr(module, "bias", None), module.eps)
        self.before = None if block.is_post_norm else own
        self._behind = own if block.is_post_norm else None
        self._read_type = read_type(block)

    def after(self, total: Tensor) -> Stream:
        """The stream once the part was added to it."""
        if self._behind is None:
            return Stream(total, total)
        read = None
        if self._read_type is not None:
            read = torch.empty_like(total, dtype=self._read_type)
        states = norm_rows(total, *self._behind, dtype=torch.float32, rounded=read)
        return Stream(states, states if read is None else read)


def added(hidden: Tensor, x: Tensor, matrix: Any, ahead: Matrix | None = None) -> Tensor:
    """[rows, hidden] float32: the stream and the product of a part's last matrix."""
    return product(x, matrix.weight, matrix.bias, residual=hidden, dtype=torch.float32, ahead=ahead)


def inner_matrix(mlp: Any) -> Any:
    """The layer that a feed-forward layer begins with."""
    gate_up = getattr(mlp, "gate_up", None)
    return mlp.up if gate_up is None else gate_up


def inner(
    hidden: Tensor,
    norm: Norm | None,
    mlp: Any,
    listed: RowList | None = None,
    ahead: Matrix | None = None,
) -> Tensor:
    """[rows, inner width]: all of a feed-forward layer but its last matrix."""
    first = inner_matrix(mlp)
    return product(
        hidden, first.weight, first.bias, norm_before=norm, activation=mlp.kind,
        gated=hasattr(mlp, "gate_up"), listed=listed, ahead=ahead,
    )  # fmt: skip


class ListedStream:
    """A stream of states in which rows that go on are changed in place, part by part.

    Attributes:
        states: [rows, hidden] float32.
        rows: those that go on.
    """

    def __init__(self, states: Tensor, rows: RowList, block: Any) -> None:
        self.states = states
        self.rows = rows
        dtype = read_type(block)
        self._rounded = None if dtype is None else states.to(dtype)

    def before(self, block: Any, module: Any, listed: RowList | None = None) -> Tensor:
        """What a part reads of the stream: of the rows that go on, or of others."""
        if block.is_post_norm:
            return self.states if self._rounded is None else self._rounded
        listed = self.rows if listed is None else listed
        return norm_rows(self.states, *_operands(module), dtype=module.weight.dtype, listed=listed)

    def add(self, x: Tensor, matrix: Any, block: Any, module: Any) -> None:
        """Add a part to the stream."""
        states, listed = self.states, self.rows
        product(
            x, matrix.weight, matrix.bias,
            residual=states, dtype=torch.float32, listed=listed, output=states,
        )  # fmt: skip
        if block.is_post_norm:
            norm_rows(
                states, *_operands(module),
                dtype=states.dtype, listed=listed, output=states, rounded=self._rounded,
            )  # fmt: skip

    def feed_forward(self, block: Any) -> None:
        """Add a block's last part."""
        read = self.before(block, block.mlp_norm)
        self.add(inner(read, None, block.mlp, self.rows), block.mlp.down, block, block.mlp_norm)


def _operands(module: Any) -> tuple[Tensor, Tensor | None, float]:
    return module.weight, getattr(module, "bias", None), module.eps
