"""What goes before the measurements: the CUDA kernels built, and Triton's compiled side by side.

Kernels compile one after the other in a process that runs them; beforehand, many processes that
time nothing fill the cache of the compiler, while nvcc is at work.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import processes

LIBRARY = processes.ROOT / "multiexit_engine" / "_cuda" / "libmultiexit_cuda.so"


class _Job(NamedTuple):
    """Every ``each``-th case of a module, in ``each`` processes."""

    module: str
    each: int


# about as many as there are cores on the machine; what few processes would take longest comes apart
JOBS = (
    _Job("head_cases", 3),
    _Job("product_cases", 2),
    _Job("code_cases", 2),
    _Job("attention_cases", 2),
    _Job("step_cases", 3),
    _Job("exit_cases", 1),
    _Job("answer_cases", 1),
)


def prepare(capability: str, build_s: float, compile_s: float) -> dict[str, Any]:
    """Build for a card, and compile what will be measured.

    Args:
        capability: of the card, such as "90".
        build_s: after which the build is given up.
        compile_s: after which compiling is; what is missing then compiles when it is measured.

    Returns:
        What came of the build, how many of the compiling processes ended, and the seconds.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = _started(
            [sys.executable, "setup.py", "build_ext", "--inplace"], folder / "build",
            MULTIEXIT_CUDA=capability,
        )  # fmt: skip
        jobs = [
            _started(_command(job, number, folder), folder / f"{job.module}{number}",
                     MULTIEXIT_COMPILE_ONLY="1", OMP_NUM_THREADS="1")
            for job in JOBS
            for number in range(job.each)
        ]  # fmt: skip
        ended = _wait(jobs, began + compile_s)
        built = _wait([build], began + build_s)
        how = "built" if built and build.returncode == 0 else f"failed: {_why(folder / 'build')}"
    return {
        "CUDA kernels": how,
        "compiling processes": f"{ended} of {len(jobs)} ended",
        "seconds": round(time.monotonic() - began, 1),
    }


def set_aside() -> str:
    """Have nothing use the built CUDA kernels any more; what became of them."""
    if not LIBRARY.exists():
        return "not built"
    LIBRARY.replace(LIBRARY.with_suffix(".failed"))
    return "set aside, since tests of theirs failed: all parts run without them"


def _command(job: _Job, number: int, folder: Path) -> list[str]:
    lines = folder / f"{job.module}{number}.lines"
    return [
        sys.executable, "-m", "benchmarks.gpu.part", f"benchmarks.gpu.{job.module}",
        "--from", str(number), "--each", str(job.each), "--lines", str(lines),
    ]  # fmt: skip


def _started(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("w") as output:
        return processes.start(command, output, **environment)


def _wait(running: list[subprocess.Popen[bytes]], deadline: float) -> int:
    """Wait for processes, and kill those that take longer; how many ended by themselves."""
    while time.monotonic() < deadline and any(each.poll() is None for each in running):
        time.sleep(0.1)
    ended = sum(each.poll() is not None for each in running)
    for each in running:
        processes.end(each)
    return ended


def _why(log: Path) -> str:
    return processes.tail(log) or "out of time"
