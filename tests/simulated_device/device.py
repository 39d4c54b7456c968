"""The stream of the simulated device: what is put into it, when it runs, and what is counted.

Knows nothing of the engine.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated_device import module  # noqa: F401 - makes the kind of device known
from tests.simulated_device.tensors import (
    SimulatedTensor,
    devices,
    each,
    flat,
    memory,
    nonsense,
    on_meta,
    quietly,
    wrapped,
)

aten = torch.ops.aten

# results whose shape or value the host has to know
WAITING = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
)

INDEXING = (aten.index.Tensor, aten.index_put_.default)
VIEWS = (aten.detach.default, aten.alias.default, aten._unsafe_view.default)


class SimulatedDevice(TorchDispatchMode):
    """One device with one stream, while its block lasts.

    Attributes:
        counts: how often the host waited, copied, and how: "waits", "pinned copies",
            "pageable copies", "copies to the host", "synchronisations", "captures", "replays".
        names: the operations that made the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self._stream: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None
        self._pinned: set[int] = set()
        self._kept: list[torch.Tensor] = []

    def synchronize(self) -> None:
        """Let the stream run empty."""
        self.counts["synchronisations"] += 1
        self._run()

    def num_waiting(self) -> int:
        return len(self._stream)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what ``call`` does without doing it; what comes back does it once more."""
        assert self._captured is None, "a capture within a capture"
        self.counts["captures"] += 1
        self._captured = recorded = []
        try:
            call()
        finally:
            self._captured = None

        def replay() -> None:
            self.counts["replays"] += 1
            self._stream.extend(recorded)

        return replay

    def parts(self) -> _Parts:
        """Captures a piece in parts; "passed over" counts those without rows."""
        self.counts["captures"] += 1
        return _Parts(self)

    def kernel(self, call: Callable[[], Any], result: SimulatedTensor) -> SimulatedTensor:
        """One operation that writes what ``call`` gives, in time; the host may wait within it."""

        def compute() -> None:
            outside = self._stream, self._captured, self.counts, self.names
            self._stream, self._captured, self.counts, self.names = [], None, Counter(), Counter()
            try:
                with self, torch.inference_mode():
                    found = call()
                self._run()
                result.memory.copy_(found.memory)
            finally:
                self._stream, self._captured, self.counts, self.names = outside

        self._add(compute)
        return result

    def run_up_to(self, place: int) -> None:
        """Run the stream's operations before a place."""
        ready, self._stream = self._stream[:place], self._stream[place:]
        for operation in ready:
            operation()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any operation, of this device or not."""
        with torch.inference_mode(False), torch.no_grad():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        ours = any(isinstance(v, SimulatedTensor) for v in flat((*args, *kwargs.values())))
        target = kwargs.get("device")
        to_us = target is not None and torch.device(target).type == "sim"
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            return self._pin(args[0].clone())
        if func in (aten.is_pinned.default,):
            return args[0].untyped_storage().data_ptr() in self._pinned
        if (ours or to_us) and _is_composed(func):
            # inference mode leaves such operations whole
            with self:
                return func.decompose(*args, **kwargs)
        if not ours and not to_us:
            if kwargs.get("pin_memory"):
                return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._convert(args[0], kwargs)
        on_device = [isinstance(argument, SimulatedTensor) for argument in args[:2]]
        if func is aten.copy_.default and not all(on_device):
            return self._copy(args[0], args[1], len(args) > 2 and args[2])
        if func in WAITING or (func in INDEXING and _has_mask(args)):
            return self._wait_for(func, args, kwargs)
        return self._enqueue(func, args, kwargs)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.add(tensor.untyped_storage().data_ptr())
        self._kept.append(tensor)
        return tensor

    def _add(self, operation: Callable[[], None]) -> None:
        (self._stream if self._captured is None else self._captured).append(operation)

    def _run(self) -> None:
        self.run_up_to(len(self._stream))

    def _must_not_capture(self, what: str) -> None:
        assert self._captured is None, f"{what} within a capture"

    def _wait_for(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._must_not_capture(f"the host waits for {func}")
        self.counts["waits"] += 1
        self.names[str(func)] += 1
        self._run()
        return wrapped(func(*memory(args), **memory(kwargs)))

    def _convert(self, tensor: torch.Tensor, kwargs: Any) -> torch.Tensor:
        target = kwargs.get("device")
        kind = torch.device(target).type if target is not None else None
        plain = {name: v for name, v in kwargs.items() if name not in ("device", "non_blocking")}
        if isinstance(tensor, SimulatedTensor) and kind in (None, "sim"):
            return self._enqueue(aten._to_copy.default, (tensor,), plain)
        if isinstance(tensor, SimulatedTensor):
            result = nonsense(torch.empty_like(tensor.memory, dtype=kwargs.get("dtype")))
            self._pin(result)
            return self._copy(result, tensor, bool(kwargs.get("non_blocking")))
        result = SimulatedTensor(nonsense(torch.empty_like(tensor, dtype=kwargs.get("dtype"))))
        return self._copy(result, tensor, bool(kwargs.get("non_blocking")))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        self._must_not_capture("a copy between host and device")
        host = source if isinstance(target, SimulatedTensor) else target
        to_device = isinstance(target, SimulatedTensor)
        is_pinned = host.untyped_storage().data_ptr() in self._pinned
        to, from_ = memory(target), memory(source)
        if is_pinned and non_blocking:
            self.counts["pinned copies" if to_device else "copies to the host"] += 1
            self._add(lambda: quietly(to.copy_, from_))
            return target
        if to_device:
            # what may wait is not what computes: a pageable copy is read at once
            self.counts["pageable copies"] += 1
            read = from_.clone()
            self._add(lambda: quietly(to.copy_, read))
            return target
        self.counts["waits"] += 1
        self.names["a copy to the host that blocks"] += 1
        self._run()
        to.copy_(from_)
        return target

    def _enqueue(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.is_view or func in VIEWS:
            return wrapped(func(*memory(args), **memory(kwargs)))
        own = {name: "cpu" if name == "device" else v for name, v in kwargs.items()}
        inner_args, inner_kwargs = memory(args), memory(own)
        mutated = [
            (args[i] if i < len(args) else kwargs.get(a.name))
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        if mutated:
            self._add(lambda: quietly(func, *inner_args, **inner_kwargs))
            return mutated[0] if len(mutated) == 1 else tuple(mutated)
        shapes = func(
            *on_meta(inner_args),
            **{**on_meta(inner_kwargs), **({"device": "meta"} if "device" in kwargs else {})},
        )
        results = each(
            lambda t: (
                nonsense(torch.empty_strided(t.size(), t.stride(), dtype=t.dtype))
                if isinstance(t, torch.Tensor)
                else t
            ),
            shapes,
        )

        def compute() -> None:
            found = flat([quietly(func, *inner_args, **inner_kwargs)])
            for place, value in zip(flat([results]), found, strict=True):
                if isinstance(value, torch.Tensor):
                    place.copy_(value)

        self._add(compute)
        return wrapped(results)


class _Parts:
    """A ``Recorder`` of the engine's."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._recorded: list[list[Callable[[], None]]] = []

    ready = staticmethod(nullcontext)

    def begin(self) -> None:
        assert self._device._captured is None, "a capture within a capture"
        self._recorded.append([])
        self._device._captured = self._recorded[-1]

    def end(self) -> None:
        self._device._captured = None

    def join(self, counts: Any) -> Callable[[], None]:
        run = functools.partial(self._run, list(counts))

        def replay() -> None:
            self._device.counts["replays"] += 1
            self._device._stream.append(run)

        return replay

    def _run(self, counts: Any) -> None:
        for own, recorded in zip(counts, self._recorded, strict=True):
            if own and not any(int(count.memory) for count in own):
                self._device.counts["passed over"] += 1
                continue
            for operation in recorded:
                operation()


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """The device "sim" exists within the block."""
    device = SimulatedDevice()
    devices.append(device)
    try:
        with device:
            yield device
    finally:
        devices.pop()


@functools.cache
def _is_composed(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _has_mask(args: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
