"""What the compiled backends can read; not an op."""

from __future__ import annotations

import torch

from multiexit_engine.quantization import QuantizedWeight, Weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(*operands: Weight) -> bool:
    """Whether the CPU kernels read operands: tensors of one float type that need no gradient.

    Quantized weights are plain beside any type.
    """
    tensors = [each for each in operands if not isinstance(each, QuantizedWeight)]
    return (
        len({tensor.dtype for tensor in tensors}) <= 1
        and all(tensor.dtype in _DTYPES for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def is_streamable(*matrices: Weight) -> bool:
    """Whether weight matrices, besides, lie row after row in memory."""
    return is_plain(*matrices) and all(
        isinstance(matrix, QuantizedWeight) or matrix.is_contiguous() for matrix in matrices
    )


def is_dense(*matrices: Weight) -> bool:
    """Whether matrices are laid out and typed as the fused GPU kernels read them."""
    return all(
        not isinstance(m, QuantizedWeight) and m.is_contiguous() and m.dtype in _DTYPES
        for m in matrices
    )
