"""Tensors of the simulated device, the memory of the CPU that they hold, and nests of both.

Knows nothing of when operations run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

NONSENSE = 0x5A

# the device that exists now, if one does: it is asked what operations on its tensors do
devices: list[Any] = []


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
        assert devices, "no simulated device"
        return devices[-1].dispatch(func, args, kwargs or {})


def flat(values: Any) -> list[Any]:
    """All values of nested sequences."""
    found: list[Any] = []
    for value in values:
        found += flat(value) if isinstance(value, tuple | list) else [value]
    return found


def each(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nest with every value changed."""
    if isinstance(value, dict):
        return {name: each(change, own) for name, own in value.items()}
    if isinstance(value, tuple | list):
        return tuple(each(change, own) for own in value)
    return change(value)


def memory(tree: Any) -> Any:
    return each(lambda v: v.memory if isinstance(v, SimulatedTensor) else v, tree)


def wrapped(tree: Any) -> Any:
    return each(lambda v: SimulatedTensor(v) if isinstance(v, torch.Tensor) else v, tree)


def on_meta(tree: Any) -> Any:
    return each(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, tree)


def nonsense(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().fill_(NONSENSE)
    return tensor


@contextmanager
def _no_mode() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def quietly(func: Any, *args: Any, **kwargs: Any) -> Any:
    with _no_mode(), torch.inference_mode(False), torch.no_grad():
        return func(*args, **kwargs)
