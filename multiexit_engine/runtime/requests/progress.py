"""Requests that are run to their end, with a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from multiexit_engine.request import Request
from multiexit_engine.runtime.requests.core_protocol import Core

FEW_REQUESTS = 8


class Progress:
    """Shows how many of ``total`` requests are done, and the tokens per second.

    With ``wanted`` None it shows itself for more than a few requests, and only on a terminal.
    """

    def __init__(self, total: int, wanted: bool | None) -> None:
        is_shown = total > FEW_REQUESTS and sys.stderr.isatty() if wanted is None else wanted
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not is_shown,
        )
        self._task = self._bar.add_task("requests", total=total)
        self._started = time.perf_counter()
        self._first_count: int | None = None

    def show(self, num_done: int, num_tokens: int) -> None:
        """Move the bar; ``num_tokens`` is the engine's running count."""
        if self._first_count is None:
            self._first_count = num_tokens
        seconds = max(time.perf_counter() - self._started, 1e-9)
        speed = (num_tokens - self._first_count) / seconds
        self._bar.update(self._task, completed=num_done, description=f"{speed:.0f} tokens/s")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def run_all(core: Core, requests: Sequence[Request], progress: bool | None) -> None:
    """Add requests and step until all are finished; on an interrupt they leave no trace."""
    for request in requests:
        core.add(request)
    try:
        with Progress(len(requests), progress) as bar:
            num_left = sum(not request.is_finished for request in requests)
            while num_left:
                changed = core.step()
                if any(request.is_finished for request in changed):
                    num_left = sum(not request.is_finished for request in requests)
                    bar.show(len(requests) - num_left, core.num_generated_tokens)
    except BaseException:
        for request in requests:
            core.forget(request.request_id)
        raise
