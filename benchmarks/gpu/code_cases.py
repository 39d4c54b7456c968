"""Products with int8, int4 and fp8 weights at the shapes of real models, against bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.timing import DEVICE, copies_of, graph_us, sized
from multiexit_engine.kernels.products import head_logits
from multiexit_engine.quantization import Quantization, QuantizedWeight, quantize

MATRICES = sized(
    (
        ("gpt2-medium", "up", 4096, 1024),
        ("gpt2-medium", "head", 50257, 1024),
        ("llama-8b", "gate, up", 28672, 4096),
    ),
    (("rehearsal", "up", 40, 96),),
)
ROWS = sized((1, 16, 64), (1, 8))


def cases(card: Card) -> Iterator[Case]:
    """One line for each matrix, kind of codes and number of rows; bfloat16 rows, float32 sums."""
    for model, part, outputs, width in MATRICES:
        for name in ("int8", "int4", "fp8"):
            weights = Once(partial(_weights, outputs, width, Quantization.parse(name)))
            for rows in ROWS:
                label = {"model": model, "part": part, "codes": name, "rows": rows}
                yield Case(label, partial(_line, weights, rows, card.read_tb_s))
            weights.forget()


def _line(made: Once[list[QuantizedWeight]], rows: int, read_tb_s: float) -> dict[str, Any]:
    weights = made()
    num_bytes = weights[0].codes.nbytes + weights[0].scales.nbytes
    x = torch.randn(rows, weights[0].shape[1], device=DEVICE, dtype=torch.bfloat16)
    us = graph_us([lambda w=w: head_logits(x, w) for w in weights])
    return {"MB": num_bytes / 1e6, "us": us, "%": num_bytes / us / read_tb_s / 1e4}


def _weights(outputs: int, width: int, quantization: Quantization) -> list[QuantizedWeight]:
    """As many as the L2 cache cannot hold; random numbers take long, so all but one are copies."""
    made = quantize(torch.randn(outputs, width) / width**0.5, quantization)
    return [
        QuantizedWeight(
            made.codes.to(DEVICE, copy=True), made.scales.to(DEVICE), width, quantization
        )
        for _ in range(copies_of(made.codes.nbytes))
    ]
