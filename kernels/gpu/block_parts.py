"""The parts that blocks over a cache and blocks over packed texts have in common.

Reads modules by the names of their parts and imports none of their classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multiexit_engine.kernels.matrices import Matrix
from multiexit_engine.kernels.norms import norm as norm_rows
from multiexit_engine.kernels.products import Norm, product
from multiexit_engine.kernels.row_lists import RowList


class PartNorm:
    """The norm of one part of a block, where it stands."""

    def __init__(self, module: Any, is_post_norm: bool) -> None:
        own = Norm(module.weight, getattr(module, "bias", None), module.eps)
        self.before = None if is_post_norm else own
        self._behind = own if is_post_norm else None

    def after(self, hidden: Tensor) -> Tensor:
        """The stream once the part was added to it."""
        if self._behind is None:
            return hidden
        return norm_rows(hidden, *self._behind, dtype=torch.float32)


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

    def __init__(self, states: Tensor, rows: RowList) -> None:
        self.states = states
        self.rows = rows

    def before(self, block: Any, module: Any, listed: RowList | None = None) -> Tensor:
        """What a part reads of the stream: of the rows that go on, or of others."""
        if block.is_post_norm:
            return self.states
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
            norm_rows(states, *_operands(module), dtype=states.dtype, listed=listed, output=states)

    def feed_forward(self, block: Any) -> None:
        """Add a block's last part."""
        read = self.before(block, block.mlp_norm)
        self.add(inner(read, None, block.mlp, self.rows), block.mlp.down, block, block.mlp_norm)


def _operands(module: Any) -> tuple[Tensor, Tensor | None, float]:
    return module.weight, getattr(module, "bias", None), module.eps
