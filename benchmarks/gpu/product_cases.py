"""The matrices of a layer at the shapes of real models, with all that is fused, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.timing import DEVICE, copies_of, graph_us, sized
from multiexit_engine.kernels.products import Norm, product


class Matrix(NamedTuple):
    """A matrix of a layer and what its launch takes on besides."""

    model: str
    part: str
    outputs: int
    width: int
    norm: str | None = None
    activation: str | None = None
    gated: bool = False
    residual: bool = False


MATRICES = sized(
    (
        Matrix("gpt2-medium", "qkv", 3072, 1024, "layer"),
        Matrix("gpt2-medium", "output", 1024, 1024, residual=True),
        Matrix("gpt2-medium", "up", 4096, 1024, "layer", "gelu_new"),
        Matrix("gpt2-medium", "down", 1024, 4096, residual=True),
        Matrix("llama-8b", "qkv", 6144, 4096, "rms"),
        Matrix("llama-8b", "output", 4096, 4096, residual=True),
        Matrix("llama-8b", "gate, up", 28672, 4096, "rms", "silu", gated=True),
        Matrix("llama-8b", "down", 4096, 14336, residual=True),
    ),
    (
        Matrix("rehearsal", "gate, up", 64, 300, "rms", "silu", gated=True),
        Matrix("rehearsal", "down", 40, 300, residual=True),
    ),
)
ROWS = sized((1, 4, 16, 32, 64), (1, 8))


def cases(card: Card) -> Iterator[Case]:
    """One line for each matrix and number of rows."""
    for matrix in MATRICES:
        weights = Once(partial(_weights, matrix))
        for rows in ROWS:
            label = {"model": matrix.model, "part": matrix.part, "rows": rows}
            yield Case(label, partial(_line, matrix, weights, rows, card.read_tb_s))
        weights.forget()
        torch.cuda.empty_cache()


def _weights(matrix: Matrix) -> Tensor:
    torch.manual_seed(0)
    size = copies_of(2 * matrix.outputs * matrix.width), matrix.outputs, matrix.width
    return torch.randn(size, device=DEVICE, dtype=torch.bfloat16) / matrix.width**0.5


def _line(matrix: Matrix, made: Once[Tensor], rows: int, read_tb_s: float) -> dict[str, Any]:
    weights = made()
    us, torch_us, bare_us = (
        graph_us([lambda w=w, f=f: f(w) for w in weights]) for f in calls(matrix, rows)
    )
    num_bytes = weights[0].nbytes
    return {
        "MB": num_bytes / 1e6,
        "us": us,
        "%": num_bytes / us / read_tb_s / 1e4,
        "torch_us": torch_us,
        "torch_product_us": bare_us,
    }


def calls(matrix: Matrix, rows: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Ours, PyTorch's, and PyTorch's product alone."""
    width, outputs = matrix.width, matrix.outputs
    x = torch.randn(rows, width, device=DEVICE)
    gain, shift = torch.randn(2, width, device=DEVICE).bfloat16()
    bias = torch.randn(outputs, device=DEVICE).bfloat16()
    stream = torch.randn(rows, outputs, device=DEVICE)
    narrow = x.bfloat16()
    norm = None
    if matrix.norm is not None:
        norm = Norm(gain, shift if matrix.norm == "layer" else None, 1e-5)

    def ours(weight: Tensor) -> Tensor:
        return product(
            x if norm else narrow, weight, bias, norm_before=norm, activation=matrix.activation,
            gated=matrix.gated, residual=stream if matrix.residual else None,
            dtype=torch.float32 if matrix.residual else None,
        )  # fmt: skip

    def theirs(weight: Tensor) -> Tensor:
        read = narrow
        if matrix.norm == "layer":
            read = functional.layer_norm(narrow, (width,), gain, shift)
        elif matrix.norm == "rms":
            read = functional.rms_norm(narrow, (width,), gain)
        result = functional.linear(read, weight, bias)
        if matrix.gated:
            gate, through = result.chunk(2, -1)
            return functional.silu(gate) * through
        if matrix.activation is not None:
            return functional.gelu(result, approximate="tanh")
        return stream + result if matrix.residual else result

    return ours, theirs, lambda weight: functional.linear(narrow, weight, bias)
