"""Times the GPU kernels against what the card can do, and against PyTorch, in one call.

``python benchmarks/gpu_report.py --output result.json`` in the repository root, on a machine with
a GPU and no network. Runs the kernels' GPU tests, measures the card's ceilings, then every kernel
at the shapes of real models, then whole models beside transformers; ``--only`` takes parts. A
kernel's time is the median of graph replays over buffers that together are several times the L2
cache; bytes are those that must be read at least once.

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
from collections.abc import Callable
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
    answer_cases,
    attention_cases,
    ceilings,
    code_cases,
    engine_check,
    exit_cases,
    head_cases,
    model_cases,
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


def sections(ceilings: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is measured, in order; a table for each that gives rows."""
    read = ceilings["read_TB_s"]
    return {
        "heads": lambda: head_cases.measure(read),
        "ring": lambda: ring_cases.measure(read),
        "products": lambda: product_cases.measure(read),
        "codes": lambda: code_cases.measure(read),
        "attention": lambda: attention_cases.measure(read),
        "engine": engine_check.measure,
        "steps": step_cases.measure,
        "exits": exit_cases.measure,
        "answers": answer_cases.measure,
        "models": lambda: model_cases.measure(read, ceilings["gemm_TFLOP_s"]),
    }


TITLES = {
    "heads": "heads: bf16, greedy; % is of the measured read bandwidth",
    "ring": "heads of few rows: ring of bulk copies against Triton",
    "products": "products: bf16, norm and epilogue fused; % is of the read bandwidth",
    "codes": "products with quantized weights: bf16 rows; % is of the read bandwidth",
    "attention": "paged attention: decode, bf16, block 16",
    "engine": f"engine on {timing.DEVICE}, greedy float32 ids against the CPU's",
    "steps": "decode steps: GPT-2-medium's shape, bf16, wall time of a step",
    "exits": "decode steps with early exits at forced rates: who decides, wall time of a step",
    "answers": "answers of 32 tokens, BART-base's size, bf16: wall time",
    "models": "whole models: bf16, wall time of a token, or of a step of many",
}


def show(name: str, found: Any) -> None:
    """Print what a section found."""
    tables = found.values() if name == "models" and isinstance(found, dict) else [found]
    for rows in tables:
        if isinstance(rows, list) and rows:
            table(TITLES[name], rows)
        elif rows:
            print(f"\n{TITLES[name]}:", rows)


def main() -> None:
    """Everything, in order; one part's failure does not cost the figures of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=os.path.join(os.environ.get("OUT", "."), "gpu.json"))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", help="parts with commas, of " + ", ".join(TITLES))
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else list(TITLES)
    if unknown := set(wanted) - set(TITLES):
        parser.error(f"--only: {unknown}; parts are {', '.join(TITLES)}")

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
    measures = sections(result["ceilings"])
    for name in wanted:
        began = time.perf_counter()
        try:
            result[name] = measures[name]()
        except Exception as error:
            result[name] = f"{type(error).__name__}: {error}"
        show(name, result[name])
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
        result["seconds"] = time.perf_counter() - start
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']:.0f} s; wrote {arguments.output}")


if __name__ == "__main__":
    main()
