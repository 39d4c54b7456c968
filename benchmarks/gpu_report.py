"""Times the GPU kernels against what the card can do, and against PyTorch, in one call.

``python benchmarks/gpu_report.py --output result.json`` in the repository root, on a machine with
a GPU and no network. Runs the kernels' GPU tests, measures the card's ceilings, then every kernel
at the shapes of real models. Every time is the median of graph replays over buffers that together
are several times the L2 cache; bytes are those that must be read at least once.

Without a GPU it is a rehearsal: the kernels run interpreted, on tiny sizes, and every time is NaN.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402

if not torch.cuda.is_available():
    from tests.kernels import interpreter  # noqa: F401

from benchmarks.gpu import (  # noqa: E402
    attention_cases,
    ceilings,
    engine_check,
    head_cases,
    product_cases,
    ring_cases,
    step_cases,
    timing,
)


def build() -> str:
    """The CUDA C++ kernels for this card; without nvcc the others do alone."""
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, "MULTIEXIT_CUDA": capability},
        capture_output=True,
        text=True,
    )
    return "built" if run.returncode == 0 else f"failed: {run.stderr[-1000:]}"


def run_tests() -> dict[str, Any]:
    """The kernels' GPU tests, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "8", "-p",
               "no:cacheprovider", "-W", "default", "tests/kernels", "tests/cuda"]  # fmt: skip
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    seconds = time.perf_counter() - start
    if run.returncode:
        print("\n".join(lines[-60:]), run.stderr[-2000:])
    return {"passed": run.returncode == 0, "summary": lines[-1] if lines else "", "s": seconds}


def machine() -> dict[str, Any]:
    """The card and the versions that the figures belong to."""
    versions = {
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if not torch.cuda.is_available():
        return {"gpu": "none: a rehearsal, nothing is timed", **versions}
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver,
        **versions,
    }


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print dictionaries of the same keys as aligned columns."""
    cells = [list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Everything, in order; the JSON is written even if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=os.path.join(os.environ.get("OUT", "."), "gpu.json"))
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()

    result: dict[str, Any] = {"machine": machine()}
    print(result["machine"])
    start = time.perf_counter()
    if torch.cuda.is_available():
        result["build"] = build()
        print("CUDA C++ kernels:", result["build"])
    if not arguments.skip_tests and torch.cuda.is_available():
        result["tests"] = run_tests()
        print("tests:", result["tests"])
    result["ceilings"] = ceilings.measure()
    table("ceilings", [result["ceilings"]])
    read = result["ceilings"]["read_TB_s"]
    result["heads"] = head_cases.measure(read)
    table("heads: bf16, greedy; % is of the measured read bandwidth", result["heads"])
    result["ring"] = ring_cases.measure(read)
    if result["ring"]:
        table("heads of few rows: ring of bulk copies against Triton", result["ring"])
    result["products"] = product_cases.measure(read)
    table("products: bf16, norm and epilogue fused; % is of the read bandwidth", result["products"])
    result["attention"] = attention_cases.measure(read)
    table("paged attention: decode, bf16, block 16", result["attention"])
    try:
        result["engine"] = engine_check.measure()
    except Exception as error:  # the engine's failure must not cost the kernels' figures
        result["engine"] = f"{type(error).__name__}: {error}"
    print(f"\nengine on {timing.DEVICE}, greedy float32 ids against the CPU's:", result["engine"])
    try:
        result["steps"] = step_cases.measure()
        table("decode steps: GPT-2-medium's shape, bf16, wall time of a step", result["steps"])
    except Exception as error:
        result["steps"] = f"{type(error).__name__}: {error}"
        print("\ndecode steps:", result["steps"])
    result["seconds"] = time.perf_counter() - start
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']:.0f} s; wrote {arguments.output}")


if __name__ == "__main__":
    main()
