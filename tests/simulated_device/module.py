"""Streams and events of the simulated device, as PyTorch asks a kind of device for them.

Importing it makes "sim" a kind of device.
"""

from __future__ import annotations

from typing import Any

from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.simulated_device.tensors import devices


class _Stream:
    def synchronize(self) -> None:
        devices[-1].synchronize()


class _Event:
    """A place in the stream; waiting for it runs what stands before, and no more."""

    def __init__(self, **_: Any) -> None:
        self._reached = [True]

    def record(self) -> None:
        self._reached = reached = [False]
        devices[-1]._add(lambda: reached.__setitem__(0, True))

    def synchronize(self) -> None:
        devices[-1].counts["synchronisations"] += 1
        while not self._reached[0]:
            devices[-1].run_up_to(1)


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
