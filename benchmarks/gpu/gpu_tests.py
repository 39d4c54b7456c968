"""The kernels' GPU tests, by many workers, each lost with the one test that it is lost in."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes, watched_tests

WHERE = ("tests/kernels", "tests/cuda")
MOST_WORKERS = 16
# one test, its compilations included
PATIENCE_S = 75.0
MOST_FAILURES = 40


def run_tests(
    limit_s: float,
    where: tuple[str, ...] = WHERE,
    marks: str = "gpu",
    patience_s: float = PATIENCE_S,
) -> dict[str, Any]:
    """How many tests gave what; the names and texts of those that failed.

    Args:
        limit_s: after which the others are left out.
        where: files or folders.
        marks: of the tests.
        patience_s: how long one test may take.
    """
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    # naming "slow" is what lets slow ones run, which no GPU is slow with
    command = [
        sys.executable, "-m", "pytest", "-q", "-m", f"({marks}) and (slow or not slow)",
        "-n", str(workers), "--max-worker-restart", "40", "-p", "no:cacheprovider", "-W", "default",
        "-p", "xdist.plugin", "-p", "benchmarks.gpu.watched_tests", *where,
    ]  # fmt: skip
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder, "lines"), Path(folder, "log")
        lines.touch()
        environment = {
            watched_tests.LINES: str(lines),
            watched_tests.MOST_SECONDS: str(patience_s),
            # every worker would import what else is installed
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        with log.open("w") as output:
            process = processes.start(command, output, **environment)
            while process.poll() is None and time.monotonic() < began + limit_s:
                time.sleep(0.2)
            code = process.poll()
            processes.end(process)
        result = _told(lines)
        if code is None:
            result["left out"] = f"what had not run after {limit_s:.0f} s"
        elif code not in (0, 1, 5):
            result["log"] = processes.tail(log)
    return result | {"seconds": round(time.monotonic() - began, 1)}


def _told(lines: Path) -> dict[str, Any]:
    """What the tests told, each once; what poisoned a worker stands before the worker's end."""
    told: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, lines.read_text().splitlines()):
        if told.get(line["test"], {}).get("outcome") != "poisoned":
            told[line["test"]] = line
    bad = [line for line in told.values() if line["outcome"] in ("failed", "poisoned")]
    return {
        "outcomes": dict(Counter(line["outcome"] for line in told.values())),
        "failed": [{"test": line["test"], "error": line["text"]} for line in bad[:MOST_FAILURES]],
    }
