"""What the compiled CPU backends can read; not an op."""

from __future__ import annotations

import torch

from multiexit_engine.quantization import QuantizedWeight, Weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(*operands: Weight) -> bool:
    """Whether the tensors among them are of one common float type and need no gradient.

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
