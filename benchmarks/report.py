"""Timing in alternation, the machine's description, tables and JSON files."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def alternate(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each turn gives: one unmeasured round, then ``rounds`` rounds in turn.

    In turn, so that a disturbance of the machine meets all of them and ratios stay honest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for measured in [False] + [True] * rounds:
        for name, turn in turns.items():
            spent = turn()
            if measured:
                seconds[name].append(spent)
    return seconds


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """A turn that gives the seconds of ``run``."""

    def turn() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return turn


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def quantile(values: list[float], share: float) -> float:
    """The least value that this share of the values does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)] if ranked else 0.0


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "multiexit-engine")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(table)


def command_line(words: Sequence[str]) -> str:
    """A command for others to read: of files outside this folder the name alone is told."""
    return shlex.join(["python", *map(_without_folder, words)])


def _without_folder(word: str) -> str:
    name, equals, path = word.rpartition("=")
    if not os.path.isabs(path):
        return word
    inside = os.path.relpath(path)
    return name + equals + (os.path.basename(path) if inside.startswith("..") else inside)


def write_json(path: Path | None, results: list[dict[str, Any]], **more: object) -> None:
    """Write the results with the command and the machine, and what else belongs to the run."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": command_line(sys.argv), "machine": machine(), "results": results} | more
    path.write_text(json.dumps(record, indent=1) + "\n")


def _cpu_name() -> str:
    flags = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile"}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value for key, _, value in (line.partition(": ") for line in lines)}
    has = " ".join(sorted(flags & set(found.get("flags", "").split())))
    return f"{found.get('model name', platform.processor())} ({has})"
