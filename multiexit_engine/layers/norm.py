"""Normalisations as modules."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.ops.norm import layer_norm, rms_norm


class LayerNorm(nn.Module):
    """Mean 0, variance 1, scale and shift."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden] to the same shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square 1 and scale, over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same shape."""
        return rms_norm(x, self.weight, self.eps)
