"""Numbers on their way to a device and back, so that neither side waits more than it must.

Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# NumPy makes an array of a few integers in a third of the time that PyTorch takes for a tensor.
_INTEGERS = {torch.int64: np.int64, torch.int32: np.int32}


def to_device(
    values: Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of values from the host; on the CPU the host's own.

    A copy from pageable memory may make the host wait for all that the device has to do; pinned
    memory is read when its turn comes, and PyTorch keeps it until then.
    """
    host = values if isinstance(values, Tensor) else _on_host(values, dtype)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _on_host(values: Sequence[Any], dtype: torch.dtype | None) -> Tensor:
    if dtype in _INTEGERS:
        return torch.from_numpy(np.array(values, _INTEGERS[dtype]))
    return torch.tensor(values, dtype=dtype)


class ToHost:
    """Tensors on their way to the host, where they are once their device was waited for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._on_host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]

    def lists(self) -> list[list[Any]]:
        """All of them as lists; nonsense before the wait."""
        return [tensor.tolist() for tensor in self._on_host]


def to_host(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Tensors of one device as lists: all in one go, with one wait."""
    on_its_way = ToHost(tensors)
    wait_for(tensors[0].device)
    return on_its_way.lists()


def wait_for(device: torch.device) -> None:
    """Let a device finish what it was given on the current stream."""
    if device.type != "cpu":
        torch.get_device_module(device).current_stream().synchronize()
