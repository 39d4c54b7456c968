"""What the compiled backends can read; not an op."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.quantization import QuantizedWeight, Weight

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def is_plain(*operands: Weight) -> bool:
    """Whether the CPU kernels read operands: tensors of one float type that need no gradient.

    Quantized weights are plain beside any type.
    """
    dtype = None
    for each in operands:
        if isinstance(each, QuantizedWeight):
            continue
        if each.dtype is not dtype:
            if dtype is not None or each.dtype not in _DTYPES:
                return False
            dtype = each.dtype
        if each.requires_grad and torch.is_grad_enabled():
            return False
    return True


def is_streamable(*matrices: Weight) -> bool:
    """Whether weight matrices, besides, lie row after row in memory."""
    return is_plain(*matrices) and are_rows(*matrices)


def are_rows(*matrices: Weight) -> bool:
    """Whether weight matrices lie row after row in memory."""
    for each in matrices:
        if not isinstance(each, QuantizedWeight) and not each.is_contiguous():
            return False
    return True


def is_dense(*matrices: Weight) -> bool:
    """Whether matrices are laid out and typed as the fused GPU kernels read them: all alike."""
    tensors = [m for m in matrices if not isinstance(m, QuantizedWeight)]
    return (
        len(tensors) == len(matrices)
        and len({m.dtype for m in tensors}) == 1
        and all(m.is_contiguous() and m.dtype in _DTYPES for m in tensors)
    )


def is_streamed(weight: Weight) -> bool:
    """Whether the GPU's fused blocks read a matrix: laid out as they want it, or quantized."""
    return isinstance(weight, QuantizedWeight) or is_dense(weight)


def is_dense_or_coded(states: Sequence[Tensor], matrices: Sequence[Weight]) -> bool:
    """Whether the fused heads of GPUs read operands: matrices all dense, or all quantized alike."""
    coded = [m for m in matrices if isinstance(m, QuantizedWeight)]
    if not coded:
        return is_dense(*states, *matrices)
    return (
        len(coded) == len(matrices)
        and len({m.quantization for m in coded}) == 1
        and all(m.codes.is_contiguous() and m.scales.is_contiguous() for m in coded)
        and is_dense(*states)
    )


def fits_ring(hidden: Tensor, *matrices: Weight) -> bool:
    """Whether the CUDA C++ kernels, which keep all hidden states in shared memory, read operands.

    They take 1 to 4 rows of half precision on compute capability 8.0 and later, of a width up to
    16384 for one row and 4096 for three and four; rows and matrices start at multiples of 16 bytes.
    """
    rows, width = hidden.shape
    return (
        1 <= rows <= 4
        and (rows if rows <= 2 else 4) * width <= 16384
        and width % 8 == 0
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and all(
            isinstance(m, Tensor)
            and m.dtype == hidden.dtype
            and m.is_contiguous()
            and m.data_ptr() % 16 == 0
            for m in matrices
        )
        and _capability(hidden.device) >= (8, 0)
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
