"""Times every candidate configuration of the kernels: ``python -m benchmarks.gpu.tune``.

Prints, for each shape, the candidates from the fastest on. The winners are written by hand into
``kernels/gpu``, where the compile tests see them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention_cases, head_cases, product_cases
from benchmarks.gpu.timing import DEVICE, copies_of, graph_us
from multiexit_engine.kernels import attention, heads, products

HEAD_SHAPES = {"gpt2-medium": (50257, 1024, (1, 16, 32, 64)), "llama-8b": (128256, 4096, (1, 64))}
ATTENTION_SHAPES = (
    (1, 1024, 16, 16, 64),
    (1, 8192, 16, 16, 64),
    (16, 8192, 16, 16, 64),
    (1, 8192, 32, 8, 128),
    (16, 8192, 32, 8, 128),
)
PRODUCT_ROWS = (1, 16)
# a tile, and the programs that a card should have at least
ProductCandidate = tuple[products.Tile, int]


def head_candidates(rows: int, width: int) -> Iterator[heads.HeadConfig]:
    """Tiles worth a try, for bf16."""
    if rows == 1 and width <= 1024:
        for block_v, warps in ((4, 4), (8, 4), (8, 8), (16, 8)):
            yield heads.HeadConfig(block_v, 1, 1024, 0, warps)
    if rows <= 16:
        for block_v, block_k, stages, warps in (
            (16, 128, 4, 4), (16, 128, 6, 4), (16, 256, 3, 4), (16, 256, 4, 4), (16, 256, 4, 2),
            (32, 64, 6, 4), (32, 128, 3, 4), (32, 128, 4, 4), (32, 128, 5, 4), (32, 256, 3, 4),
            (32, 256, 4, 4), (32, 128, 4, 2), (64, 64, 4, 4), (64, 128, 3, 4), (64, 128, 4, 4),
            (64, 64, 6, 4),
        ):  # fmt: skip
            for max_registers in (None, 128):
                yield heads.HeadConfig(block_v, 16, block_k, stages, warps, max_registers)
        return
    block_r = 32 if rows <= 32 else 64
    for block_v, block_k, stages, warps in (
        (32, 64, 3, 4), (32, 64, 4, 4), (32, 128, 3, 4), (32, 128, 4, 4), (32, 64, 4, 8),
        (32, 64, 6, 8), (32, 128, 4, 8), (64, 64, 3, 4), (64, 64, 4, 4), (64, 128, 3, 4),
        (64, 128, 4, 4), (64, 64, 4, 8),
        (64, 128, 3, 8), (128, 64, 3, 8), (128, 64, 4, 8), (128, 64, 4, 4),
    ):  # fmt: skip
        yield heads.HeadConfig(
            block_v, block_r, block_k, stages, warps, 128 if warps == 8 else None
        )


def attention_candidates() -> Iterator[tuple[int, attention.AttentionConfig]]:
    """Keys of a part, and tiles."""
    for chunk in (128, 256, 512):
        for block_n, stages, warps in (
            (32, 3, 4), (32, 4, 2), (64, 2, 4), (64, 3, 4), (64, 4, 4), (64, 3, 2), (128, 2, 4),
            (128, 3, 4), (128, 2, 8),
        ):  # fmt: skip
            if block_n <= chunk:
                yield chunk, attention.AttentionConfig(16, block_n, stages, warps)


def product_candidates() -> Iterator[ProductCandidate]:
    """Tiles worth a try for up to 16 rows, in few long parts and in many short ones."""
    for block_k, stages in ((64, 6), (128, 3), (128, 4), (128, 6), (256, 2), (256, 3)):
        for warps in (2, 4):
            for programs in (96, 192, 384, 512):
                yield products.Tile(32, 16, block_k, stages, warps, 128), programs


def product_calls(
    matrix: product_cases.Matrix, rows: int, candidate: ProductCandidate, weights: torch.Tensor
) -> list[Callable[[], object]]:
    """One call for each copy of a matrix, cut in this way."""
    tile, programs = candidate
    products.tile_for = lambda *_: tile  # type: ignore[assignment]
    products._PROGRAMS = programs
    ours = product_cases.calls(matrix, rows)[0]
    return [lambda w=w: ours(w) for w in weights]


def compile_product(job: tuple[product_cases.Matrix, int, ProductCandidate]) -> str:
    """Fill the compiler's cache, with a matrix of no particular contents."""
    matrix, rows, candidate = job
    weights = torch.empty(1, matrix.outputs, matrix.width, device=DEVICE, dtype=torch.bfloat16)
    return compiled(product_calls(matrix, rows, candidate, weights), candidate)


def compiled(calls: list[Callable[[], object]], candidate: object) -> str:
    """Why these do not run; nothing if they do."""
    try:
        for call in calls:
            call()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not compile is a result too
        return f"{candidate}: {str(error)[:80]}"
    return ""


def head_calls(
    rows: int, config: heads.HeadConfig, pairs: list[Any], contrast: bool
) -> list[Callable[[], object]]:
    """One call for each pair of heads, with this configuration."""
    upper, lower = head_cases.hidden_states(rows, pairs[0][0].shape[1])
    alpha = torch.full((rows,), head_cases.ALPHA, device=DEVICE)
    ids = torch.arange(rows, device=DEVICE)
    drawing = (torch.zeros(rows, device=DEVICE), ids, ids)
    heads.head_config = lambda *_: config  # type: ignore[assignment]
    if contrast:
        return [
            lambda p=p: heads.contrast_tokens(upper, p[0], lower, p[1], alpha, *drawing)
            for p in pairs
        ]
    return [lambda p=p: heads.head_tokens(upper, p[0], None, *drawing) for p in pairs]


def compile_head(job: tuple[int, int, int, heads.HeadConfig]) -> str:
    """Fill the compiler's cache, with heads of no particular contents."""
    rows, vocab, width, config = job
    head = torch.empty(vocab, width, device=DEVICE, dtype=torch.bfloat16)
    calls = [head_calls(rows, config, [(head, head)], contrast)[0] for contrast in (True, False)]
    return compiled(calls, config)


def compile_attention(job: tuple[Any, ...]) -> str:
    """Fill the compiler's cache, on a short context."""
    chunk, config, heads_, kv_heads, head_dim = job
    return compiled(attention_case(chunk, config, (1, 512, heads_, kv_heads, head_dim), 1), config)


def attention_case(
    chunk: int, config: attention.AttentionConfig, shape: tuple[int, ...], copies: int
) -> list[Callable[[], object]]:
    """One call for each copy of the cache."""
    batch, context, num_heads, kv_heads, head_dim = shape
    layout = attention_cases.layout_of(batch, context)
    query = torch.randn(batch, num_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    blocks = batch * context // attention_cases.BLOCK_SIZE
    size = (copies, 2, blocks, attention_cases.BLOCK_SIZE, kv_heads, head_dim)
    caches = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    attention.MIN_CHUNK = chunk
    attention.short_config = lambda *_: config  # type: ignore[assignment]
    return [
        lambda c=c: attention.paged_attention(query, c[0], c[1], layout, 0.125, None)
        for c in caches
    ]


def timed(calls: Callable[[], list[Callable[[], object]]]) -> float:
    """Microseconds, or infinity for a candidate that does not run."""
    try:
        return graph_us(calls(), replays=7)
    except Exception:  # reported as a candidate that does not run
        torch.cuda.synchronize()
        return float("inf")


def main() -> None:
    """Compile all candidates side by side, then time them one by one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=os.path.join(os.environ.get("OUT", "."), "tune.json"))
    parser.add_argument("--only", choices=("heads", "attention", "products"))
    arguments = parser.parse_args()
    head_jobs = [
        (rows, vocab, width, config)
        for vocab, width, all_rows in HEAD_SHAPES.values()
        for rows in all_rows
        for config in head_candidates(rows, width)
    ]
    attention_jobs = [
        (*candidate, num_heads, kv_heads, head_dim)
        for candidate in attention_candidates()
        for num_heads, kv_heads, head_dim in sorted({shape[2:] for shape in ATTENTION_SHAPES})
    ]
    product_jobs = [
        (matrix, rows, candidate)
        for matrix in product_cases.MATRICES
        for rows in PRODUCT_ROWS
        for candidate in product_candidates()
    ]
    parts = (
        ("heads", compile_head, head_jobs, time_heads),
        ("attention", compile_attention, attention_jobs, time_attention),
        ("products", compile_product, product_jobs, time_products),
    )
    wanted = [part for part in parts if arguments.only in (None, part[0])]
    failures: list[str] = []
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for _, compile_one, jobs, _ in wanted:
            failures += filter(None, pool.map(compile_one, jobs))
    print("do not compile:", *failures, sep="\n  ")
    results: dict[str, Any] = {}
    for *_, time_all in wanted:
        time_all(results)
    Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")


def time_heads(results: dict[str, Any]) -> None:
    """Contrast and plain head of every candidate."""
    for model, (vocab, width, all_rows) in HEAD_SHAPES.items():
        torch.manual_seed(0)
        pairs = head_cases.weights(vocab, width, copies_of(2 * vocab * width))
        floor_mb = vocab * width * 2 / 1e6
        for rows in all_rows:
            lines = []
            for config in head_candidates(rows, width):
                contrast, head = (
                    timed(lambda c=config, x=x, r=rows, p=pairs: head_calls(r, c, p, x))
                    for x in (True, False)
                )
                lines.append((contrast, head, tuple(config)))
            lines.sort(key=lambda line: line[0])
            report(results, f"{model} rows {rows} ({floor_mb:.0f} MB)", lines, floor_mb)
        torch.cuda.empty_cache()


def time_attention(results: dict[str, Any]) -> None:
    """Decode rows of every candidate."""
    for shape in ATTENTION_SHAPES:
        batch, context, _, kv_heads, head_dim = shape
        num_bytes = 4 * batch * context * kv_heads * head_dim
        lines = [
            (timed(lambda c=c, s=s, b=num_bytes: attention_case(*c, s, min(copies_of(b), 24))), c)
            for c in attention_candidates()
            for s in (shape,)
        ]
        lines.sort(key=lambda line: line[0])
        flat = [(us, us, (chunk, *config)) for us, (chunk, config) in lines]
        report(results, f"attention {shape}", flat, num_bytes / 1e6)


def time_products(results: dict[str, Any]) -> None:
    """Layers' matrices with every candidate."""
    for matrix in product_cases.MATRICES:
        num_bytes = 2 * matrix.outputs * matrix.width
        size = copies_of(num_bytes), matrix.outputs, matrix.width
        weights = torch.randn(size, device=DEVICE, dtype=torch.bfloat16) / matrix.width**0.5
        for rows in PRODUCT_ROWS:
            lines = []
            for candidate in product_candidates():
                us = timed(
                    lambda m=matrix, r=rows, c=candidate, w=weights: product_calls(m, r, c, w)
                )
                lines.append((us, us, (*candidate[0], candidate[1])))
            lines.sort(key=lambda line: line[0])
            report(results, f"{matrix.model} {matrix.part} rows {rows}", lines, num_bytes / 1e6)
        del weights
        torch.cuda.empty_cache()


def report(results: dict[str, Any], name: str, lines: list[Any], megabytes: float) -> None:
    """Print the best and keep all."""
    print(f"{name}")
    for first, second, config in lines[:6]:
        print(f"  {first:8.2f} us ({megabytes / first:5.2f} TB/s)  {second:8.2f} us  {config}")
    results[name] = lines


if __name__ == "__main__":
    main()
