"""Time on a GPU without what the host costs; without a GPU, a rehearsal that gives no times."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Buffers that a measurement goes through must not fit the L2 cache: H100 50 MB, H200 60 MB.
ROTATED_BYTES = 512 * 2**20
# set where cases only fill the compiler's cache, many at a time: nothing is timed then
COMPILES_ONLY = bool(os.environ.get("MULTIEXIT_COMPILE_ONLY"))


def sized(real: T, rehearsed: T) -> T:
    """What to measure on a GPU, and what to rehearse in the interpreter."""
    return real if DEVICE == "cuda" else rehearsed


def copies_of(num_bytes: int) -> int:
    """How many buffers of this size a measurement goes through."""
    return 1 if COMPILES_ONLY else sized(max(2, -(-ROTATED_BYTES // num_bytes)), 2)


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 15) -> float:
    """Median microseconds of one call, over replays of a graph of all of them, in order.

    Without a GPU every call is made once and the time is NaN; so it is where nothing is timed.
    """
    if DEVICE == "cpu" or COMPILES_ONLY:
        for call in calls[: 1 if COMPILES_ONLY else None]:
            call()
        return float("nan")
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    rounds = max(1, 24 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)
