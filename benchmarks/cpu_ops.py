"""Bytes per second of each CPU op beside a plain read of memory, in one alternating run.

python benchmarks/cpu_ops.py --threads 2 --json results/cpu_ops.json

Bytes are those that must be read: the weights, or the cached keys and values, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import alternate, median, show, timed, write_json
from torch.nn import functional

from multiexit_engine import _C
from multiexit_engine.batch import SequenceLayout
from multiexit_engine.ops import (
    contrast_tokens,
    head_statistics,
    head_tokens,
    linear,
    paged_attention,
    use_backend,
)

HIDDEN, VOCAB = 768, 50257
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Way = tuple[int, Callable[[], object]]


def products(dtype: torch.dtype, rows: list[int]) -> dict[str, Way]:
    """A head's matrix times some rows, here and in PyTorch."""
    weight = torch.randn(VOCAB, HIDDEN).to(dtype)
    ways: dict[str, Way] = {}
    for count in rows:
        x = torch.randn(count, HIDDEN).to(dtype)
        ways[f"linear, {count} rows"] = weight.nbytes, lambda x=x: linear(x, weight, None)
        ways[f"PyTorch linear, {count} rows"] = (
            weight.nbytes,
            lambda x=x: functional.linear(x, weight),
        )
    return ways


def heads(dtype: torch.dtype) -> dict[str, Way]:
    """Tokens of one row, from one head and from a contrast with some twenty candidates."""
    weight, lower = (torch.randn(VOCAB, HIDDEN).mul(0.1).to(dtype) for _ in range(2))
    hidden = torch.randn(1, HIDDEN).to(dtype)
    alpha, zeros = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int64)
    ways: dict[str, Way] = {}
    for name, heat in (("greedy", torch.zeros(1)), ("sampled", torch.ones(1))):
        ways[f"head_tokens, {name}"] = (
            weight.nbytes,
            lambda heat=heat: head_tokens(hidden, weight, None, heat, zeros, zeros),
        )
        ways[f"contrast_tokens, {name}"] = (
            weight.nbytes,
            lambda heat=heat: contrast_tokens(
                hidden, weight, hidden, lower, alpha, heat, zeros, zeros
            ),
        )
    ways["head_statistics"] = weight.nbytes, lambda: head_statistics(hidden, weight)
    return ways


def attention(dtype: torch.dtype, context: int) -> dict[str, Way]:
    """One new token of eight sequences, twelve heads of 64."""
    num_seqs, block_size = 8, 16
    per_seq = context // block_size
    shape = (num_seqs * per_seq, block_size, 12, 64)
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    query = torch.randn(num_seqs, 12, 64).to(dtype)
    layout = SequenceLayout(
        query_lens=(1,) * num_seqs,
        context_lens=(context,) * num_seqs,
        cu_query_lens=torch.arange(num_seqs + 1, dtype=torch.int32),
        context_lens_device=torch.full((num_seqs,), context, dtype=torch.int32),
        block_tables=torch.arange(num_seqs * per_seq, dtype=torch.int32).view(num_seqs, -1),
    )
    return {
        f"paged_attention, 8 x {context} keys": (
            keys.nbytes + values.nbytes,
            lambda: paged_attention(query, keys, values, layout, 0.125, None),
        )
    }


def plain_read(threads: int) -> dict[str, Way]:
    """The ceiling: numbers summed as they stream by."""
    numbers = torch.ones(64 << 20)
    return {
        "plain read": (
            numbers.nbytes,
            lambda: _C.plain_read(threads, numbers.data_ptr(), numbers.numel()),
        )
    }


def main(
    threads: int = 2,
    rounds: int = 15,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16")] = None,
    json: Path | None = None,
) -> None:
    """Measure, print a table, and write the figures."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in dtype or list(DTYPES):
        kind = DTYPES[name]
        ways = plain_read(threads) | products(kind, [1, 2, 4, 8, 16, 32])
        ways |= heads(kind) | attention(kind, 1024)
        with torch.inference_mode(), use_backend("native"):
            seconds = alternate({way: timed(run) for way, (_, run) in ways.items()}, rounds)
        read = max(ways["plain read"][0] / t for t in seconds["plain read"])
        for way, (size, _) in ways.items():
            rate = size / median(seconds[way])
            best = size / min(seconds[way])
            rows.append(
                {
                    "dtype": name,
                    "op": way,
                    "ms": 1000 * median(seconds[way]),
                    "gb_per_s": rate / 1e9,
                    "best_gb_per_s": best / 1e9,
                    "best_share_of_read": best / read,
                }
            )
    title = f"{_C.isa()}, {threads} threads, load {os.getloadavg()[0]:.1f}"
    columns = ["op", "dtype", "ms", "GB/s", "best GB/s", "best / best read"]
    show(title, columns, [_cells(row) for row in rows])
    write_json(json, rows)


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = row["ms"], row["gb_per_s"], row["best_gb_per_s"]
    share = f"{row['best_share_of_read']:.0%}"
    return [row["op"], row["dtype"], *(f"{number:.2f}" for number in numbers), share]


if __name__ == "__main__":
    typer.run(main)
