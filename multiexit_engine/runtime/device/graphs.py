"""Steps as recorded pieces: for which numbers of rows, and what is recorded once.

A piece reads and writes memory that stays where it is. Knows nothing of models, heads or requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], None]
# turns a call into one that repeats what it did on the device, without Python between
Capture = Callable[[Call], Call]

# keys below this number share a piece; above it, up to the next power of two
LEAST_BOUND = 256

# Rows of answers that are found at once: the rows of the products' tiles, then several of them.
# What lies between costs little, since blocks of rows that are not listed end at once.
ANSWER_SIZES = (16, 32, 64, 256)
MOST_ANSWER_ROWS = 4096


class Pieces(Protocol):
    """How the pieces of a step run.

    Attributes:
        sizes: numbers of rows that pieces may be captured for; none where nothing is captured.
        bounds: numbers of keys likewise.
        is_warm: what requests were said to want is captured: new short pieces run from Python.
    """

    sizes: Sequence[int]
    bounds: Sequence[int]
    is_warm: bool

    def size(self, num_rows: int) -> int:
        """Rows to run for so many sequences, padding included."""

    def bound(self, num_keys: int) -> int:
        """Keys to provide for when the longest sequence has so many."""

    def run(self, key: Hashable, size: int, call: Call, *, is_short: bool = False) -> None:
        """Do what ``call`` does, which equal keys say is the same but for memory's contents.

        A short piece is a few launches, which Python makes in less time than a capture takes.
        """


class Eager:
    """Runs every piece from Python, for just the rows there are."""

    sizes: Sequence[int] = ()
    bounds: Sequence[int] = ()
    is_warm = False

    def size(self, num_rows: int) -> int:
        return num_rows

    def bound(self, num_keys: int) -> int:
        return num_keys

    def run(self, key: Hashable, size: int, call: Call, *, is_short: bool = False) -> None:
        call()


class Graphs:
    """Runs a piece from Python when it is new, and what was captured of it from then on.

    Args:
        sizes: numbers of rows that pieces are captured for; more rows run from Python.
        most_keys: that a row sees.
        capture: records a piece.
    """

    def __init__(self, sizes: Sequence[int], most_keys: int, capture: Capture) -> None:
        self.sizes: Sequence[int] = sorted(sizes)
        self.bounds: Sequence[int] = key_bounds(most_keys)
        self.is_warm = False
        self._capture = capture
        self._captured: dict[Hashable, Call] = {}

    @property
    def num_captured(self) -> int:
        """Pieces that are recorded by now."""
        return len(self._captured)

    def size(self, num_rows: int) -> int:
        place = bisect_left(self.sizes, num_rows)
        return self.sizes[place] if place < len(self.sizes) else num_rows

    def bound(self, num_keys: int) -> int:
        return self.bounds[bisect_left(self.bounds, num_keys)]

    def run(self, key: Hashable, size: int, call: Call, *, is_short: bool = False) -> None:
        if size > self.sizes[-1]:
            call()
        elif key in self._captured:
            self._captured[key]()
        elif self.is_warm and is_short:
            call()
        else:
            # Kernels are compiled and libraries set up outside the capture, which runs nothing.
            call()
            self._captured[key] = self._capture(call)


def capture_on(device: torch.device) -> Capture:
    """Captures pieces as CUDA graphs in one pool of memory: they run one after the other."""
    pool: Any = torch.cuda.graph_pool_handle()

    def capture(call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(device),
            # other threads may use the device meanwhile
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            call()
        return graph.replay

    return capture


def key_bounds(most_keys: int) -> tuple[int, ...]:
    """256 and powers of two, up to the most."""
    count = max(0, (most_keys - 1).bit_length() - (LEAST_BOUND - 1).bit_length())
    return (*(LEAST_BOUND << power for power in range(count)), most_keys)


def graph_sizes(max_batch_size: int) -> tuple[int, ...]:
    """1, 2, 4 and multiples of 8, up to the first that holds the largest batch."""
    small = [size for size in (1, 2, 4) if size < max_batch_size]
    large = range(8, max_batch_size + 8, 8) if max_batch_size > 4 else [max_batch_size]
    return (*small, *(min(size, max_batch_size) for size in large))
