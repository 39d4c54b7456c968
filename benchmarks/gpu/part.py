"""One part of the report, in a process of its own: ``python -m benchmarks.gpu.part MODULE ...``.

Writes a line of JSON before and after each case, so that whoever started it knows what was
measured, and which case was under way, when the process ends, hangs or is killed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Card, Case

MOST_TEXT = 600
# how a process ends whose CUDA context is of no use any more: whatever follows would fail, too
POISONED = 86


def run(cases: Iterable[Case], write: Callable[[dict[str, Any]], None], wanted: range) -> None:
    """Measure the cases whose numbers are wanted, and write what comes of each."""
    for number, case in enumerate(cases):
        if number not in wanted:
            continue
        write({"begins": number, "label": case.label})
        try:
            found = case.measure()
        except Exception as error:
            write({"ends": number, "label": case.label, "error": shortened(error)})
            if _is_poisoned():
                os._exit(POISONED)
        else:
            rows = found if isinstance(found, list) else [found]
            write({"ends": number, "rows": [case.label | row for row in rows]})


def shortened(error: Exception) -> str:
    """An error's text, the middle of long ones left out."""
    text = f"{type(error).__name__}: {error}".strip()
    if len(text) <= MOST_TEXT:
        return text
    return f"{text[: MOST_TEXT // 2]} [...] {text[-MOST_TEXT // 2 :]}"


def _is_poisoned() -> bool:
    """Whether the device gives nothing but errors from now on, as after an illegal access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def rehearse_without_gpu() -> None:
    """Have the kernels interpreted where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.kernels import interpreter  # noqa: F401


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="has cases(card), or cases(card, of)")
    parser.add_argument("--of", help="what the module's cases are to be of")
    parser.add_argument("--lines", type=Path, required=True, help="where lines are appended")
    parser.add_argument("--card", type=float, nargs=2, default=[float("nan")] * 2)
    parser.add_argument("--from", dest="first", type=int, default=0, help="of the cases")
    parser.add_argument("--each", type=int, default=1, help="every so many-th case only")
    options = parser.parse_args()
    if options.module.startswith("benchmarks."):
        rehearse_without_gpu()
    own = [] if options.of is None else [options.of]
    cases = importlib.import_module(options.module).cases(Card(*options.card), *own)

    def write(line: dict[str, Any]) -> None:
        with options.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")

    run(cases, write, range(options.first, sys.maxsize, options.each))


if __name__ == "__main__":
    main()
