"""Products and norms."""

from __future__ import annotations

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.tensors import ACTIVATIONS, DTYPES, address, matrix, vector
from multiexit_engine.quantization import Weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See ``multiexit_engine.ops.linear``."""
    x, shift = x.contiguous(), vector(bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    _C.linear(
        torch.get_num_threads(),
        x.data_ptr(),
        x.shape[0],
        matrix(weight),
        address(shift),
        out.data_ptr(),
        DTYPES[x.dtype],
    )
    return out


def linear_activation(x: Tensor, weight: Weight, bias: Tensor | None, kind: str) -> Tensor:
    """See ``multiexit_engine.ops.linear_activation``."""
    x, shift = x.contiguous(), vector(bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    _C.linear_activation(
        torch.get_num_threads(),
        x.data_ptr(),
        x.shape[0],
        matrix(weight),
        address(shift),
        ACTIVATIONS[kind],
        out.data_ptr(),
        DTYPES[x.dtype],
    )
    return out


def gate_odds(
    normed: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    thresholds: Tensor,
    by_entropy: Tensor,
) -> Tensor:
    """See ``multiexit_engine.ops.gate_odds``."""
    normed, thresholds, by_entropy = (
        part.contiguous() for part in (normed, thresholds, by_entropy)
    )
    out = torch.empty(len(normed))
    _C.gate_odds(
        torch.get_num_threads(),
        normed.data_ptr(),
        len(normed),
        _C.Linear(matrix(up), up_bias.data_ptr()),
        _C.Linear(matrix(down), down_bias.data_ptr()),
        thresholds.data_ptr(),
        by_entropy.data_ptr(),
        out.data_ptr(),
    )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See ``multiexit_engine.ops.layer_norm``."""
    return _norm(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``multiexit_engine.ops.rms_norm``."""
    return _norm(x, weight, None, eps)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x, scale, shift = x.contiguous(), vector(weight), vector(bias)
    out = torch.empty_like(x)
    size = x.shape[-1]
    norm = _C.Norm(address(scale), address(shift), eps)
    _C.norm(
        torch.get_num_threads(),
        x.data_ptr(),
        norm,
        out.data_ptr(),
        x.numel() // size,
        size,
        DTYPES[x.dtype],
    )
    return out
