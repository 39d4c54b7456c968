"""Products with weight matrices."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import register_op


@register_op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [rows, in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [rows, out_features] in the dtype of ``x``.

    Source: ``torch.nn.functional.linear``.
    """
    return functional.linear(x, weight, bias)


linear.backend(
    "cpu",
    "multiexit_engine._native:linear",
    device="cpu",
    supports=lambda x, weight, bias: is_plain(x, weight) and is_streamable(weight),
)
