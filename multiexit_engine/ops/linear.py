"""Products with weight matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from multiexit_engine.ops.activation import ACTIVATIONS
from multiexit_engine.ops.operands import are_rows, is_dense, is_plain
from multiexit_engine.ops.registry import register_op
from multiexit_engine.quantization import QuantizedWeight, Weight, as_tensor

# Up to so many rows the GPU's kernels stream a matrix at full bandwidth; PyTorch multiplies more.
_FEW_ROWS = 64


@register_op
def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``; a quantized weight is dequantized, not ``x`` quantized.

    Args:
        x: [rows, in_features].
        weight: [out_features, in_features], or a quantized weight of this shape, whose product is
            summed in float32 at least.
        bias: [out_features] or None.

    Returns:
        [rows, out_features] in the dtype of ``x``.

    Source: ``torch.nn.functional.linear``.
    """
    if isinstance(weight, QuantizedWeight):
        wide = torch.promote_types(x.dtype, torch.float32)
        shift = None if bias is None else bias.to(wide)
        return functional.linear(x.to(wide), as_tensor(weight, wide), shift).to(x.dtype)
    return functional.linear(x, weight, bias)


@register_op
def linear_activation(x: Tensor, weight: Weight, bias: Tensor | None, kind: str) -> Tensor:
    """``activation(linear(x, weight, bias), kind)``; see both.

    A backend may keep the product in float32 until the activation is taken.

    Args:
        x: [rows, in_features].
        weight: [out_features, in_features], may be quantized.
        bias: [out_features] or None.
        kind: a key of ``ACTIVATIONS``.

    Returns:
        [rows, out_features] in the dtype of ``x``.

    Source: ``torch.nn.functional.linear``; ``ACT2FN`` of transformers.
    """
    return ACTIVATIONS[kind](linear.reference(x, weight, bias))


def _is_skinny(x: Tensor, weight: Weight, *_: object) -> bool:
    """Quantized weights are multiplied as they are for any number of rows."""
    if isinstance(weight, QuantizedWeight):
        return is_plain(x)
    return is_dense(weight) and is_plain(x, weight) and x.shape[0] <= _FEW_ROWS


linear.backend(
    "triton", "multiexit_engine.kernels.products:linear", device="cuda", supports=_is_skinny
)
linear_activation.backend(
    "triton",
    "multiexit_engine.kernels.products:linear_activation",
    device="cuda",
    supports=_is_skinny,
)
linear.backend(
    "cpu",
    "multiexit_engine._native:linear",
    device="cpu",
    supports=lambda x, weight, bias: is_plain(x, weight) and are_rows(weight),
)
linear_activation.backend(
    "cpu",
    "multiexit_engine._native:linear_activation",
    device="cpu",
    supports=lambda x, weight, bias, kind: is_plain(x, weight) and are_rows(weight),
)
