"""Captured graphs joined to one, parts of which the device passes over, by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_uint64
from pathlib import Path

from multiexit_engine._cuda.library import PATH, loaded

MOST_COUNTS = 2


class _Part(ctypes.Structure):
    """``MultiexitGraphPart``."""

    _fields_ = [("graph", c_uint64), ("counts", c_uint64 * MOST_COUNTS)]


class GraphLibrary:
    """The functions of one build."""

    def __init__(self, path: Path = PATH) -> None:
        """Load a build.

        Raises:
            ImportError: there is none at ``path``, or it is of other sources than these.
            RuntimeError: it, or the driver, is of a CUDA without conditional nodes.
        """
        self._library = loaded(path)
        self._library.multiexit_graph_error.restype = c_char_p
        self._library.multiexit_graph_join.argtypes = [
            ctypes.POINTER(_Part),
            c_int64,
            ctypes.POINTER(c_uint64),
        ]
        self._library.multiexit_graph_launch.argtypes = [c_uint64, c_uint64]
        self._library.multiexit_graph_free.argtypes = [c_uint64]
        self._check(self._library.multiexit_graph_check())

    def join(self, parts: Sequence[tuple[int, Sequence[int]]]) -> JoinedGraph:
        """One graph that runs the parts one after the other.

        Args:
            parts: of each the address of a ``cudaGraph_t``, and those of up to two int32 on the
                device: it is passed over if all are 0 when its turn has come. None: it always runs.

        Raises:
            RuntimeError: CUDA refuses it.
        """
        made = (_Part * len(parts))(
            *(_Part(graph, (c_uint64 * MOST_COUNTS)(*counts)) for graph, counts in parts)
        )
        joined = c_uint64()
        self._check(self._library.multiexit_graph_join(made, len(parts), ctypes.byref(joined)))
        return JoinedGraph(self, joined.value)

    def launch(self, joined: int, stream: int) -> None:
        """Launch on a stream of the current device; RuntimeError where CUDA refuses it."""
        self._check(self._library.multiexit_graph_launch(joined, stream))

    def free(self, joined: int) -> None:
        self._library.multiexit_graph_free(joined)

    def _check(self, code: int) -> None:
        if code:
            reason = self._library.multiexit_graph_error(c_int(code)).decode()
            raise RuntimeError(f"conditional graph nodes: {reason}")


class JoinedGraph:
    """What ``GraphLibrary.join`` made, as long as it is kept."""

    def __init__(self, library: GraphLibrary, address: int) -> None:
        self._library = library
        self._address = address

    def launch(self, stream: int) -> None:
        self._library.launch(self._address, stream)

    def __del__(self) -> None:
        self._library.free(self._address)
