"""Normalisation of hidden states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from multiexit_engine.ops.operands import is_plain
from multiexit_engine.ops.registry import register_op


@register_op
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Rows with mean 0 and variance 1, scaled and shifted.

    Args:
        x: [rows, hidden].
        weight: [hidden] in the dtype of ``x`` or a narrower one.
        bias: [hidden] of the same dtype.
        eps: added to the variance.

    Returns:
        [rows, hidden] in the dtype of ``x``.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """
    return functional.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


@register_op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows with root mean square 1, scaled; the statistics are at least float32.

    Args:
        x: [..., hidden].
        weight: [hidden] in the dtype of ``x`` or a narrower one.
        eps: added to the mean square.

    Returns:
        The shape and dtype of ``x``.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; rounding as in transformers'
        ``LlamaRMSNorm``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


layer_norm.backend(
    "triton",
    "multiexit_engine.kernels.norms:layer_norm",
    device="cuda",
    supports=lambda x, weight, bias, eps: is_plain(x) and is_plain(weight, bias),
)
rms_norm.backend(
    "triton",
    "multiexit_engine.kernels.norms:rms_norm",
    device="cuda",
    supports=lambda x, weight, eps: is_plain(x) and is_plain(weight),
)
layer_norm.backend(
    "cpu",
    "multiexit_engine._native:layer_norm",
    device="cpu",
    supports=lambda x, weight, bias, eps: is_plain(x) and is_plain(weight, bias),
)
rms_norm.backend(
    "cpu",
    "multiexit_engine._native:rms_norm",
    device="cpu",
    supports=lambda x, weight, eps: is_plain(x) and is_plain(weight),
)
