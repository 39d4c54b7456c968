"""What the compiled CPU backends can read; not an op."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(*tensors: Tensor) -> bool:
    """Whether the tensors are of one common float type and need no gradient."""
    dtype = tensors[0].dtype
    return (
        dtype in _DTYPES
        and all(tensor.dtype is dtype for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def is_streamable(*matrices: Tensor) -> bool:
    """Whether weight matrices, besides, lie row after row in memory."""
    return is_plain(*matrices) and all(matrix.is_contiguous() for matrix in matrices)
