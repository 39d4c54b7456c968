"""What the extension needs to know of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from multiexit_engine import _C

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: Tensor | None) -> int:
    """Of the first number; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(weight: Tensor) -> _C.Matrix:
    """A view of a contiguous [rows, columns] tensor, which must outlive it."""
    return _C.Matrix(weight.data_ptr(), DTYPES[weight.dtype], *weight.shape)


def vector(values: Tensor | None) -> Tensor | None:
    """The float32 form of a bias or scale: itself, or a copy that the caller must keep."""
    if values is None or (values.dtype is torch.float32 and values.is_contiguous()):
        return values
    return values.detach().float().contiguous()
