"""Arrays side by side in one stretch of a device's memory, so that one copy fills them.

Knows nothing of what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# host copies of each buffer: one may still be read by the device while the other is filled
TURNS = 2
_ALIGNMENT = 8

Fields = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]


class Packed:
    """Arrays side by side in one stretch of the device's memory, with pinned twins on the host.

    Attributes:
        on_device: the arrays by name.
    """

    def __init__(self, fields: Fields, device: torch.device) -> None:
        places, size = [], 0
        for name, dtype, shape in fields:
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            places.append((name, dtype, shape, size, size + num_bytes))
            size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[start:stop].view(dtype).view(shape)
                for name, dtype, shape, start, stop in places
            }

        pinned = device.type != "cpu"
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self._twins = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(TURNS)
        ]
        self._starts = {name: start for name, _, _, start, _ in places}
        self.on_device = views(self._memory)
        self._arrays = [
            {name: view.numpy() for name, view in views(twin).items()} for twin in self._twins
        ]

    def on_host(self, turn: int) -> dict[str, Any]:
        """One of the twins, as numpy arrays by name."""
        return self._arrays[turn]

    def send(self, turn: int, last: str, num_bytes: int) -> None:
        """Copy a twin to the device: all before the field ``last`` and so much of that."""
        stop = self._starts[last] + num_bytes
        self._memory[:stop].copy_(self._twins[turn][:stop], non_blocking=True)

    def fetch(self, turn: int, end: str | None = None) -> None:
        """Copy what is on the device to a twin; it is there when the device has come so far.

        Args:
            turn: which twin.
            end: a field that is not wanted, nor those behind it.
        """
        stop = len(self._memory) if end is None else self._starts[end]
        self._twins[turn][:stop].copy_(self._memory[:stop], non_blocking=True)
