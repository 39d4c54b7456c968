"""Times the GPU kernels against what the card can do, and against PyTorch, in one call.

``python benchmarks/gpu_report.py --output result.json`` in the repository root, on a machine with
a GPU and no network. Builds the CUDA kernels, compiles the others side by side, runs the GPU tests,
measures the card's ceilings, then every kernel at the shapes of real models, then whole models
beside transformers; ``--only`` takes parts. A kernel's time is the median of graph replays over
buffers that together are several times the L2 cache; bytes are those that must be read at least
once.

Every part is a process of its own: one that fails, hangs, crashes or leaves the GPU's context
poisoned costs the case that it was at, which the report names. What was found is written as it
comes, and ``--budget`` is kept: parts that no longer fit are named as left out.

Without a GPU it is a rehearsal: the kernels run interpreted, on tiny sizes, and every time is NaN.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import gpu_tests, preparing, processes  # noqa: E402

# what is measured first says what the others are worth, and is wanted in any case
CEILINGS_S = 60.0
BUILD_S, COMPILE_S, TESTS_S = 100.0, 75.0, 130.0


class Part(NamedTuple):
    """What a process measures.

    Attributes:
        module: of ``benchmarks.gpu``.
        title: of its tables.
        seconds: that it should take, about; with less left of the budget it is left out.
        patience_s: how long one case may take; compilations are a part of the first ones.
        of: what the module's cases are of.
    """

    module: str
    title: str
    seconds: float
    patience_s: float = 45.0
    of: str | None = None


# by worth, since the last ones may not fit
PARTS = {
    "heads": Part("head_cases", "heads: bf16, greedy; % is of the measured read bandwidth", 25),
    "ring": Part("ring_cases", "heads of few rows: ring of bulk copies against Triton", 20),
    "products": Part(
        "product_cases", "products: bf16, norm and epilogue fused; % is of the read bandwidth", 25
    ),
    "attention": Part("attention_cases", "paged attention: decode, bf16, block 16", 25),
    "engine": Part("engine_check", "the engine: greedy float32 ids against the CPU's", 25),
    "steps": Part("step_cases", "decode steps: GPT-2-medium's shape, bf16: wall time", 70, 60),
    "gpt2-medium": Part(
        "model_cases", "bf16: wall time of a token, or of a step of many", 75, 90, "gpt2-medium"
    ),
    "exits": Part("exit_cases", "decode steps with early exits at forced rates: wall time", 60, 60),
    "answers": Part("answer_cases", "answers of 32 tokens, BART-base's size: wall time", 60, 60),
    "codes": Part("code_cases", "products with quantized weights: % of the read bandwidth", 25),
    "llama-8b": Part(
        "model_cases", "bf16: wall time of a token, or of a step of many", 150, 120, "llama-8b"
    ),
    "gpt-neo-125m": Part(
        "model_cases", "bf16: wall time of a token, or of a step of many", 60, 90, "gpt-neo-125m"
    ),
}


class Report:
    """What is known so far; on the disk at any time."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self.found: dict[str, Any] = {"left out": {}, "parts": {}}
        self._path = path
        self._began = time.monotonic()
        self._budget_s = budget_s

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self._budget_s - (time.monotonic() - self._began)

    def keep(self, name: str, value: Any) -> None:
        """Have something in the file."""
        self.found[name] = value
        self.write()

    def write(self) -> None:
        """Write the file anew; whoever kills this meanwhile finds the one before."""
        self.found["seconds"] = round(time.monotonic() - self._began, 1)
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.replace(self._path)

    def run(self, name: str, part: Part, card: tuple[float, float]) -> None:
        """Measure a part, or say why not."""
        if self.left_s < part.seconds:
            why = f"{self.left_s:.0f} s of the budget were left, it takes about {part.seconds:.0f}"
            self.found["left out"][name] = why
            self.write()
            print(f"\n{name}: left out, {why}", flush=True)
            return

        def keep(found: processes.Found) -> None:
            self.found["parts"][name] = found.as_json()
            self.write()

        most = min(2 * part.seconds, self.left_s)
        show(part.title, processes.run_part(command(part, card), most, part.patience_s, keep))


def command(part: Part, card: tuple[float, float]) -> list[str]:
    """How a part's process is started."""
    own = [] if part.of is None else ["--of", part.of]
    module = f"benchmarks.gpu.{part.module}"
    return [sys.executable, "-m", "benchmarks.gpu.part", module, *own, "--card", *map(str, card)]


def show(title: str, found: processes.Found) -> None:
    """Print what was found: lines of the same figures as a table, then what failed."""
    print(f"\n{title}")
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found.rows:
        kinds.setdefault(tuple(row), []).append(row)
    for names, rows in kinds.items():
        cells = [list(names), *([_cell(value) for value in row.values()] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        for line in cells:
            print("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)))
    for failed in found.failed:
        print("FAILED", *(f"{name}={value}" for name, value in failed.items()))
    print(f"({found.seconds:.0f} s)", flush=True)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)[:120]


def measured_card(report: Report) -> tuple[float, float]:
    """The card's ceilings, NaN where they could not be measured; they head the report."""
    ceilings = Part("ceilings", "the card and its ceilings", 20)
    nothing = (math.nan, math.nan)
    found = processes.run_part(command(ceilings, nothing), CEILINGS_S, CEILINGS_S)
    report.found["machine"] = found.rows[0] if found.rows else {}
    report.keep("ceilings", found.rows[1] if len(found.rows) > 1 else found.as_json())
    show(ceilings.title, found)
    known = report.found["ceilings"]
    return known.get("read_TB_s", math.nan), known.get("gemm_TFLOP_s", math.nan)


def prepare(report: Report, skip_tests: bool) -> None:
    """Build, compile and test, on a machine with a GPU."""
    capability = report.found["machine"].get("capability", "90")
    report.keep("build", preparing.prepare(capability, BUILD_S, COMPILE_S))
    print("\nbuilt and compiled:", report.found["build"], flush=True)
    if skip_tests:
        return
    report.keep("tests", gpu_tests.run_tests(min(TESTS_S, report.left_s)))
    print("\ntests:", json.dumps(report.found["tests"], indent=1), flush=True)
    failed = [line["test"] for line in report.found["tests"]["failed"]]
    if any(name.startswith("tests/cuda") for name in failed):
        report.keep("CUDA kernels", preparing.set_aside())
        print("\nCUDA kernels:", report.found["CUDA kernels"], flush=True)


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=os.path.join(os.environ.get("OUT", "."), "gpu.json"))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", help="parts with commas, of " + ", ".join(PARTS))
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for everything")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: {unknown}; parts are {', '.join(PARTS)}")

    report = Report(Path(arguments.output), arguments.budget)
    card = measured_card(report)
    if not report.found["machine"].get("gpu", "none").startswith("none"):
        prepare(report, arguments.skip_tests)
    for name in wanted:
        report.run(name, PARTS[name], card)
    report.write()
    print(f"\n{report.found['seconds']:.0f} s; wrote {arguments.output}")


if __name__ == "__main__":
    main()
