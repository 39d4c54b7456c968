"""Heads of few rows: the ring of bulk copies in CUDA C++ against the Triton kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import head_cases
from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.timing import copies_of, sized
from multiexit_engine.kernels import heads as triton_heads

ROWS = sized((1, 2, 4), (1, 3))


def built() -> Any:
    """The library of this installation, or None."""
    try:
        return importlib.import_module("multiexit_engine._cuda.built")
    except ImportError:
        return None


def cases(card: Card, ring: Any = None) -> Iterator[Case]:
    """One line for each model and number of rows; none where the library was not built."""
    ring = ring or built()
    if ring is None:
        return
    for model, (vocab, width) in head_cases.MODELS.items():
        pairs = Once(partial(head_cases.weights, vocab, width, copies_of(2 * vocab * width)))
        for rows in ROWS:
            label = {"model": model, "rows": rows}
            yield Case(label, partial(_line, ring, pairs, rows, card.read_tb_s))
        pairs.forget()
        torch.cuda.empty_cache()


def _line(ring: Any, made: Once[head_cases.Pairs], rows: int, read_tb_s: float) -> dict[str, Any]:
    pairs = made()
    states = head_cases.hidden_states(rows, pairs[0][0].shape[1])
    contrast, sampled, head = head_cases.fused_us(ring, pairs, states)
    others = head_cases.fused_us(triton_heads, pairs, states)
    percent = pairs[0][0].nbytes / read_tb_s / 1e4
    return {
        "contrast_us": contrast,
        "contrast_%": percent / contrast,
        "triton_contrast_us": others[0],
        "sampled_us": sampled,
        "triton_sampled_us": others[1],
        "head_us": head,
        "head_%": percent / head,
        "triton_head_us": others[2],
    }
