"""Pieces that are captured in parts, some of which the device passes over for lists of nobody.

Every part is a capture of its own, so memory is kept for it as for any other; afterwards all are
joined to one graph. Knows nothing of models, heads or requests.
"""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from multiexit_engine.config import EngineConfig
from multiexit_engine.runtime.device.graphs import Call, Capture, capture_on

# what a part waits for: it runs if any of them is not 0; none: it always runs
Counts = tuple[Tensor, ...]


class Recorder(Protocol):
    """Captures the parts of one piece."""

    def ready(self) -> AbstractContextManager[None]:
        """Where parts are captured."""

    def begin(self) -> None:
        """Begin the next part."""

    def end(self) -> None:
        """End it."""

    def join(self, counts: Sequence[Counts]) -> Call:
        """What runs all parts on the device, each if it is to run."""


class _Parts:
    """A piece while it is captured."""

    def __init__(self, recorder: Recorder) -> None:
        self.counts: list[Counts] = [()]
        self._recorder = recorder

    def go_on(self, counts: Counts) -> None:
        """End a part and begin the next."""
        self._recorder.end()
        self._recorder.begin()
        self.counts.append(counts)


_capturing: ContextVar[_Parts | None] = ContextVar("_capturing", default=None)


@contextmanager
def only_if(*counts: Tensor, otherwise: Call | None = None) -> Iterator[None]:
    """What stands inside does nothing where all counts are 0, so the device may pass over it.

    Has an effect while a piece is captured in parts; blocks must not stand within one another.

    Args:
        counts: one or two, [1] int32.
        otherwise: does what is left to do where the inside is passed over; runs in front of it.
    """
    parts = _capturing.get()
    if parts is None:
        yield
        return
    if otherwise is not None:
        otherwise()
    parts.go_on(counts)
    yield
    parts.go_on(())


def in_parts(new_recorder: Callable[[], Recorder]) -> Capture:
    """Captures pieces in parts, which ``only_if`` tells apart."""

    def capture(call: Call) -> Call:
        recorder = new_recorder()
        parts = _Parts(recorder)
        outside = _capturing.set(parts)
        try:
            with recorder.ready():
                recorder.begin()
                try:
                    call()
                finally:
                    recorder.end()
        finally:
            _capturing.reset(outside)
        return recorder.join(parts.counts)

    return capture


def graph_library() -> Any:
    """What joins graphs.

    Raises:
        ValueError: it is not built, or it or the driver is of a CUDA before 12.4.
    """
    try:
        return importlib.import_module("multiexit_engine._cuda.graphs").GraphLibrary()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"conditional_nodes=True: {error}; or give conditional_nodes=False"
        ) from error


def new_capture(config: EngineConfig) -> Capture:
    """What captures the pieces of an engine."""
    on = capture_in_parts_on if config.conditional_nodes else capture_on
    return on(config.device)


def capture_in_parts_on(device: torch.device) -> Capture:
    """``capture_on`` in parts; all share one pool of memory and one stream."""
    library, pool = graph_library(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return in_parts(lambda: _CudaRecorder(library, device, stream, pool))


class _CudaRecorder:
    """Captures parts as CUDA graphs."""

    def __init__(self, library: Any, device: torch.device, stream: Any, pool: Any) -> None:
        self._library = library
        self._device = device
        self._stream = stream
        self._pool = pool
        self._graphs: list[Any] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        # as torch.cuda.graph does: what is freed within a capture would break it
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # other threads may use the device meanwhile
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)

    def end(self) -> None:
        with warnings.catch_warnings():
            # nothing need stand behind what may be passed over
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self._graphs[-1].capture_end()

    def join(self, counts: Sequence[Counts]) -> Call:
        # these keep the memory of their captures, in which the counts lie
        device, graphs = self._device, self._graphs
        if len(graphs) == 1:
            with torch.cuda.device(device):
                graphs[0].instantiate()
            return graphs[0].replay  # type: ignore[no-any-return]
        addresses = [tuple(count.data_ptr() for count in own) for own in counts]
        raw = [graph.raw_cuda_graph() for graph in graphs]
        with torch.cuda.device(device):
            joined = self._library.join(list(zip(raw, addresses, strict=True)))

        def replay() -> None:
            assert graphs
            with torch.cuda.device(device):
                joined.launch(torch.cuda.current_stream(device).cuda_stream)

        return replay
