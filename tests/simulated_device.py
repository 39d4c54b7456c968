"""A device that is not there: it counts what the host does, and computes as late as a GPU may.

Tensors of the device "sim" hold memory of the CPU. An operation on them is put at the end of a
stream and runs when somebody waits for it; a copy from pinned memory reads that memory then, and a
copy to the host leaves nonsense there until then. So a step that reads its results too early, or
overwrites its inputs too early, gives wrong tokens. A capture records operations without running
them, on the memory they had; a replay puts them into the stream again: values that Python saw
while capturing stay what they were.

Nothing here looks at the engine.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NONSENSE = 0x5A

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


class SimulatedTensor(torch.Tensor):
    """A tensor of the device; ``memory`` is where it lies."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> SimulatedTensor:
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                memory.size(),
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
                device=torch.device("sim:0"),
            )
        tensor.memory = memory
        return tensor

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _current is not None, "no simulated device"
        return _current.dispatch(func, args, kwargs or {})


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
        ours = any(isinstance(v, SimulatedTensor) for v in _flat((*args, *kwargs.values())))
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
        if func in WAITING or (
            func in (aten.index.Tensor, aten.index_put_.default) and _has_mask(args)
        ):
            return self._wait_for(func, args, kwargs)
        return self._enqueue(func, args, kwargs)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.add(tensor.untyped_storage().data_ptr())
        self._kept.append(tensor)
        return tensor

    def _add(self, operation: Callable[[], None]) -> None:
        (self._stream if self._captured is None else self._captured).append(operation)

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives, without its values."""
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key not in _known:
            on_meta = {name: "meta" if name == "device" else v for name, v in kwargs.items()}
            _known[key] = func(*_on_meta(args), **_on_meta(on_meta))
        return _known[key]

    def _run(self) -> None:
        self.run_up_to(len(self._stream))

    def _must_not_capture(self, what: str) -> None:
        assert self._captured is None, f"{what} within a capture"

    def _wait_for(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._must_not_capture(f"the host waits for {func}")
        self.counts["waits"] += 1
        self.names[str(func)] += 1
        self._run()
        return _wrapped(func(*_memory(args), **_memory(kwargs)))

    def _convert(self, tensor: torch.Tensor, kwargs: Any) -> torch.Tensor:
        target = kwargs.get("device")
        kind = torch.device(target).type if target is not None else None
        plain = {name: v for name, v in kwargs.items() if name not in ("device", "non_blocking")}
        if isinstance(tensor, SimulatedTensor) and kind in (None, "sim"):
            return self._enqueue(aten._to_copy.default, (tensor,), plain)
        if isinstance(tensor, SimulatedTensor):
            result = _nonsense(torch.empty_like(tensor.memory, dtype=kwargs.get("dtype")))
            self._pin(result)
            return self._copy(result, tensor, bool(kwargs.get("non_blocking")))
        result = SimulatedTensor(_nonsense(torch.empty_like(tensor, dtype=kwargs.get("dtype"))))
        return self._copy(result, tensor, bool(kwargs.get("non_blocking")))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        self._must_not_capture("a copy between host and device")
        host = source if isinstance(target, SimulatedTensor) else target
        to_device = isinstance(target, SimulatedTensor)
        is_pinned = host.untyped_storage().data_ptr() in self._pinned
        to, from_ = _memory(target), _memory(source)
        if is_pinned and non_blocking:
            self.counts["pinned copies" if to_device else "copies to the host"] += 1
            self._add(lambda: _quietly(to.copy_, from_))
            return target
        if to_device:
            # what may wait is not what computes: a pageable copy is read at once
            self.counts["pageable copies"] += 1
            read = from_.clone()
            self._add(lambda: _quietly(to.copy_, read))
            return target
        self.counts["waits"] += 1
        self.names["a copy to the host that blocks"] += 1
        self._run()
        to.copy_(from_)
        return target

    def _enqueue(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.is_view or func in (
            aten.detach.default,
            aten.alias.default,
            aten._unsafe_view.default,
        ):
            return _wrapped(func(*_memory(args), **_memory(kwargs)))
        own = {name: "cpu" if name == "device" else v for name, v in kwargs.items()}
        inner_args, inner_kwargs = _memory(args), _memory(own)
        mutated = [
            (args[i] if i < len(args) else kwargs.get(a.name))
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        if mutated:
            self._add(lambda: _quietly(func, *inner_args, **inner_kwargs))
            return mutated[0] if len(mutated) == 1 else tuple(mutated)
        shapes = func(
            *_on_meta(inner_args),
            **{**_on_meta(inner_kwargs), **({"device": "meta"} if "device" in kwargs else {})},
        )
        results = _each(
            lambda t: (
                _nonsense(torch.empty_strided(t.size(), t.stride(), dtype=t.dtype))
                if isinstance(t, torch.Tensor)
                else t
            ),
            shapes,
        )

        def compute() -> None:
            found = _flat([_quietly(func, *inner_args, **inner_kwargs)])
            for place, value in zip(_flat([results]), found, strict=True):
                if isinstance(value, torch.Tensor):
                    place.copy_(value)

        self._add(compute)
        return _wrapped(results)


_current: SimulatedDevice | None = None
# what operations give for arguments of some shapes
_known: dict[Any, Any] = {}


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """The device "sim" exists within the block."""
    global _current
    _current = device = SimulatedDevice()
    try:
        with device:
            yield device
    finally:
        _current = None


@functools.cache
def _is_composed(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


class _Stream:
    def synchronize(self) -> None:
        assert _current is not None
        _current.synchronize()


class _Event:
    """A place in the stream; waiting for it runs what stands before, and no more."""

    def __init__(self, **_: Any) -> None:
        self._reached = [True]

    def record(self) -> None:
        assert _current is not None
        self._reached = reached = [False]
        _current._add(lambda: reached.__setitem__(0, True))

    def synchronize(self) -> None:
        assert _current is not None
        _current.counts["synchronisations"] += 1
        while not self._reached[0]:
            _current.run_up_to(1)


class _DeviceModule:
    """What ``torch.get_device_module`` gives for the device."""

    Event = _Event

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_stream() -> _Stream:
        return _Stream()

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Nothing here draws random numbers."""


_setup_privateuseone_for_python_backend("sim", backend_module=_DeviceModule())


def _flat(values: Any) -> list[Any]:
    """All values of nested sequences."""
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, tuple | list) else [value]
    return found


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nest with every value changed."""
    if isinstance(value, dict):
        return {name: _each(change, own) for name, own in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_each(change, own) for own in value)
    return change(value)


def _memory(tree: Any) -> Any:
    return _each(lambda v: v.memory if isinstance(v, SimulatedTensor) else v, tree)


def _wrapped(tree: Any) -> Any:
    return _each(lambda v: SimulatedTensor(v) if isinstance(v, torch.Tensor) else v, tree)


def _on_meta(tree: Any) -> Any:
    return _each(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, tree)


def _described(value: Any) -> Any:
    """A key that is the same for values of the same shapes."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return type(value), value


def _like(value: Any) -> Any:
    """Memory for a result, full of nonsense."""
    if not isinstance(value, torch.Tensor):
        return value
    return _nonsense(torch.empty_strided(value.size(), value.stride(), dtype=value.dtype))


def _has_mask(args: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _nonsense(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().fill_(NONSENSE)
    return tensor


@contextmanager
def _no_mode() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _quietly(func: Any, *args: Any, **kwargs: Any) -> Any:
    with _no_mode(), torch.inference_mode(False), torch.no_grad():
        return func(*args, **kwargs)
