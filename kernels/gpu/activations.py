"""Nonlinearities inside kernels, by transformers' names, on float32 tiles."""

from __future__ import annotations

import triton
import triton.language as tl

# What each name computes; transformers has several names for the same function.
FORMS = {
    "gelu": "erf",
    "gelu_fast": "tanh",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@triton.jit
def activate(x, FORM: tl.constexpr):
    """A form of ``FORMS``, element by element; "none" for x itself."""
    if FORM == "erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if FORM == "tanh":
        # 1 + tanh(u) is 2 sigmoid(2 u), which needs no function of a library
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if FORM == "quick":
        return x * tl.sigmoid(1.702 * x)
    if FORM == "relu":
        # not maximum: NaN stays NaN
        return tl.where(x < 0.0, 0.0, x)
    if FORM == "silu":
        return x * tl.sigmoid(x)
    return x
