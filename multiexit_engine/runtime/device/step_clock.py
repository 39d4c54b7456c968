"""What the parts of a step take, on the host or on a CUDA device, without waiting for either."""

from __future__ import annotations

from time import perf_counter

import torch


class StepClock:
    """Marks between the parts of one step."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """A part ends here and the next one begins."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._times.append(perf_counter())

    def seconds(self) -> list[float]:
        """What lies between the marks; on CUDA the step's one wait must be over."""
        if self._is_cuda:
            pairs = zip(self._events, self._events[1:], strict=False)
            return [first.elapsed_time(second) / 1000 for first, second in pairs]
        return [b - a for a, b in zip(self._times, self._times[1:], strict=False)]
