"""What the extension needs to know of a tensor, and its numbers for types and activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from multiexit_engine import _C
from multiexit_engine.quantization import QuantizedWeight, Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {
    "gelu": 0,
    "gelu_fast": 1,
    "gelu_new": 1,
    "gelu_pytorch_tanh": 1,
    "quick_gelu": 2,
    "relu": 3,
    "silu": 4,
    "swish": 4,
}


# numbers that the extension may read on both sides of a head's own
_MARGIN = 16


def address(tensor: Tensor | None) -> int:
    """Of the first number; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(weight: Weight) -> _C.Matrix:
    """A view of a contiguous [rows, columns] tensor or quantized weight, which must outlive it."""
    if isinstance(weight, QuantizedWeight):
        how, (rows, columns) = weight.quantization, weight.shape
        return _C.Matrix(
            weight.codes.data_ptr(),
            rows,
            columns,
            how.bits,
            weight.scales.data_ptr(),
            how.group_of(columns),
            how.is_float,
        )
    return _C.Matrix(weight.data_ptr(), DTYPES[weight.dtype], *weight.shape)


def vector(values: Tensor | None) -> Tensor | None:
    """The float32 form of a bias or scale: itself, or a copy that the caller must keep."""
    if values is None or (values.dtype is torch.float32 and values.is_contiguous()):
        return values
    return values.detach().float().contiguous()


def by_place(bias: Tensor) -> Tensor:
    """[heads, distances + margins] float32: biases for distances in the order of the keys."""
    return pad(bias.detach().float().flip(1), (_MARGIN, _MARGIN), mode="replicate")
