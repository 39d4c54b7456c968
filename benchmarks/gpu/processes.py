"""Runs parts of the report in processes of their own, which may hang, crash or poison their GPU.

Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import MOST_TEXT, POISONED

ROOT = Path(__file__).resolve().parents[2]
# after so many lost processes the rest of a part is left alone
MOST_LOST = 4
_POLL_S = 0.1


@dataclass
class Found:
    """What came of a part: figures, what failed and why, seconds."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {"rows": self.rows, "failed": self.failed, "seconds": round(self.seconds, 1)}


class _Case:
    """The case that a process was last heard of."""

    def __init__(self) -> None:
        self.number = -1
        self.label: dict[str, Any] = {}
        self.is_under_way = False
        self.heard = time.monotonic()


def run_part(
    command: Sequence[str],
    limit_s: float,
    patience_s: float,
    keep: Callable[[Found], None] = lambda _: None,
) -> Found:
    """Run a part to its end, with a new process behind the case that the last one was lost in.

    Args:
        command: a ``benchmarks.gpu.part``, without its ``--from`` and ``--lines``.
        limit_s: of the whole part.
        patience_s: how long nothing may be heard of a process.
        keep: called whenever something new was found.
    """
    found, began = Found(), time.monotonic()
    first = lost = 0
    while True:
        case = _Case()
        why = _run_process(command, first, began + limit_s, patience_s, case, found, keep)
        found.seconds = time.monotonic() - began
        if why is None:
            break
        if case.is_under_way:
            found.failed.append(case.label | {"error": why})
        elif why != _POISONED:
            found.failed.append({"error": why})
        lost += 1
        # nothing was begun: the next process would not get further
        if case.number < first or lost == MOST_LOST or found.seconds >= limit_s:
            break
        first = case.number + 1
    keep(found)
    return found


_POISONED = "its GPU was of no use any more"


def _run_process(
    command: Sequence[str],
    first: int,
    deadline: float,
    patience_s: float,
    case: _Case,
    found: Found,
    keep: Callable[[Found], None],
) -> str | None:
    """Run one process; why it did not get to its end, if it did not."""
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder, "lines"), Path(folder, "log")
        lines.touch()
        full = [*command, "--from", str(first), "--lines", str(lines)]
        with log.open("w") as output, lines.open() as reading:
            process = start(full, output)
            why: str | None = None
            while why is None:
                code = process.poll()
                _read(reading, case, found, keep)
                if code is not None:
                    break
                now = time.monotonic()
                if now > deadline:
                    why = "out of time"
                elif now > case.heard + patience_s:
                    why = f"nothing was heard of it for {patience_s:g} s"
                time.sleep(_POLL_S)
            end(process)
        if why is not None:
            return why
        if code == POISONED:
            return _POISONED
        return None if code == 0 else f"{how_it_ended(code)}: {tail(log)}"


def _read(reading: Any, case: _Case, found: Found, keep: Callable[[Found], None]) -> None:
    while True:
        place = reading.tell()
        line = reading.readline()
        if not line.endswith("\n"):
            reading.seek(place)  # the rest is still being written
            return
        told = json.loads(line)
        case.heard = time.monotonic()
        case.is_under_way = "begins" in told
        case.number = told.get("begins", told.get("ends"))
        case.label = told.get("label", {})
        found.rows += told.get("rows", [])
        if "error" in told:
            found.failed.append(case.label | {"error": told["error"]})
        if not case.is_under_way:
            keep(found)


def start(command: Sequence[str], output: Any, **environment: str) -> subprocess.Popen[bytes]:
    """Start a process of a group of its own, in the repository's root."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": _python_path(), **environment},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started; one that the driver holds is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        return


def how_it_ended(code: int) -> str:
    """An exit status in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def tail(log: Path) -> str:
    """The end of what a process printed."""
    return log.read_text(errors="replace").strip()[-MOST_TEXT:]


def _python_path() -> str:
    """The repository, and ``benchmarks/`` whose files import each other by their bare names."""
    own = [str(ROOT), str(ROOT / "benchmarks")]
    return os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
