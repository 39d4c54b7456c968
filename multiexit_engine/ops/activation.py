"""Nonlinearities of the feed-forward layers, by transformers' names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from multiexit_engine.ops.registry import register_op


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}


@register_op
def gated_activation(x: Tensor, kind: str) -> Tensor:
    """``activation(gate) * up`` of a fused product.

    Args:
        x: [rows, 2 * inner], the gate first.
        kind: a key of ``ACTIVATIONS``.

    Returns:
        [rows, inner] in the dtype of ``x``.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6; ``LlamaMLP`` of transformers.
    """
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * up
