"""What the card can do at most: the figures that kernels are held against."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu.cases import Card, Case
from benchmarks.gpu.timing import DEVICE, graph_us, sized

GEMM = sized(8192, 64)
ELEMENTS = sized(2**30, 2**18)
HEAD_BYTES = sized(103 * 10**6, 2**17)


@triton.jit
def _read_kernel(source_ptr, sink_ptr, steps, BLOCK: tl.constexpr):
    """Sum of a stretch of memory, in large independent loads."""
    start = tl.program_id(0).to(tl.int64) * steps * BLOCK
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(steps):
        offsets = start + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source_ptr + offsets)
    tl.store(sink_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _empty_kernel(sink_ptr):
    tl.store(sink_ptr, 1)


def cases(_: Card) -> Iterator[Case]:
    """The card's name and versions, then its ceilings."""
    yield Case({}, machine)
    yield Case({}, measure)


def machine() -> dict[str, Any]:
    """The card and the versions that the figures belong to."""
    versions = {
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if not torch.cuda.is_available():
        return {"gpu": "none: a rehearsal, nothing is timed", **versions}
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "gpu": properties.name,
        "capability": "".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver,
        **versions,
    }


def measure() -> dict[str, Any]:
    """Bandwidths in TB/s, bf16 TFLOP/s, microseconds of a kernel and of a graph's node."""
    source = torch.randint(-9, 9, (ELEMENTS,), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    sink = torch.zeros(2**20, dtype=torch.int32, device=DEVICE)
    copy = graph_us([lambda: target.copy_(source)])
    reads = {}
    for block, steps, warps in ((4096, 1, 4), (8192, 1, 8), (4096, 4, 4), (8192, 16, 8)):
        grid = (source.numel() // (block * steps),)
        us = graph_us(
            [lambda b=block, s=steps, w=warps, g=grid:
             _read_kernel[g](source, sink, s, BLOCK=b, num_warps=w)]
        )  # fmt: skip
        reads[f"{block}x{steps}"] = source.nbytes / us / 1e6
    size = HEAD_BYTES // 4 // 4096 * 4096
    parts = [source[i * size : (i + 1) * size] for i in range(min(8, ELEMENTS // size))]
    small = graph_us(
        [lambda p=p: _read_kernel[(size // 4096,)](p, sink, 1, BLOCK=4096) for p in parts]
    )
    left, right = (torch.randn(GEMM, GEMM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    gemm = graph_us([lambda: left @ right])
    node = graph_us([lambda: _empty_kernel[(1,)](sink)] * sized(200, 2))
    eager = _eager_us(lambda: _empty_kernel[(1,)](sink))
    return {
        "copy_TB_s": 2 * source.nbytes / copy / 1e6,
        "read_TB_s": max(reads.values()),
        "read_103MB_TB_s": size * 4 / small / 1e6,
        "gemm_TFLOP_s": 2 * GEMM**3 / gemm / 1e6,
        "graph_node_us": node,
        "eager_launch_us": eager,
    }


def _eager_us(call: Any) -> float:
    if DEVICE == "cpu":
        return float("nan")
    for _ in range(100):
        call()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(1000):
        call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))
