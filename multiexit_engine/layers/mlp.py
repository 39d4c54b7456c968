"""Feed-forward layers, plain and gated."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.errors import CheckpointError
from multiexit_engine.layers.linear import Linear
from multiexit_engine.ops.activation import ACTIVATIONS, gated_activation
from multiexit_engine.ops.linear import linear_activation


def check_activation(name: str) -> str:
    """The name itself; raises CheckpointError when it is not among the engine's activations."""
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"activation {name!r} in config.json: supported are {', '.join(ACTIVATIONS)}"
        )
    return name


class MLP(nn.Module):
    """``down(activation(up(x)))``."""

    def __init__(self, up: Linear, down: Linear, kind: str) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.kind = check_activation(kind)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden] to the same shape."""
        inner = linear_activation(x, self.up.weight, self.up.bias, self.kind)
        return self.down(inner)  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` with gate and up in one matrix, the gate first."""

    def __init__(self, gate_up: Linear, down: Linear, kind: str) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.kind = check_activation(kind)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden] to the same shape."""
        return self.down(gated_activation(self.gate_up(x), self.kind))  # type: ignore[no-any-return]
