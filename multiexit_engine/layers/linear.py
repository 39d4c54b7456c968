"""A weight matrix as a module."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.ops.linear import linear
from multiexit_engine.quantization import Weight


class Linear(nn.Module):
    """``x @ weight.T + bias``; ``weight`` is [out_features, in_features], and may be quantized."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight: Weight = weight
        if isinstance(weight, Tensor):
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        return linear(x, self.weight, self.bias)
