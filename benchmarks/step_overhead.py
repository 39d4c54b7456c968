"""Microseconds of a decode step that pass outside the C++ kernels: Python and torch.

python benchmarks/step_overhead.py --threads 2

Whole ``generate`` calls of small models, intake and texts of the outputs included, less the time
inside the extension's functions, by the number of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoints import KEPT_CHECKPOINTS, TINY, make_checkpoint
from report import median, show, write_json

from multiexit_engine import _C, Contrast, DecodingMode, Engine, Exit, Original, SamplingParams


class NativeClock:
    """Seconds spent inside the extension's functions while it is running."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wrap every function of the extension; its classes stay as they are."""
        functions = {
            name: function
            for name, function in vars(_C).items()
            if callable(function) and not isinstance(function, type)
        }
        try:
            for name, function in functions.items():
                setattr(_C, name, self._timed(function))
            yield
        finally:
            for name, function in functions.items():
                setattr(_C, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def measure(
    engine: Engine, decoding: list[DecodingMode], sampling: SamplingParams, rounds: int
) -> tuple[float, float]:
    """Median microseconds per step outside and inside the extension; one prompt for each mode."""
    vocab = engine.model_config.vocab_size
    outside, inside = [], []
    for number in range(rounds + 1):
        generator = torch.Generator().manual_seed(number)
        prompts = torch.randint(vocab, (len(decoding), 8), generator=generator).tolist()
        clock, steps = NativeClock(), engine.stats().num_steps
        with clock.running():
            started = time.perf_counter()
            engine.generate(prompts, sampling, decoding, progress=False)
            seconds = time.perf_counter() - started
        steps = engine.stats().num_steps - steps
        outside.append(1e6 * (seconds - clock.seconds) / steps)
        inside.append(1e6 * clock.seconds / steps)
    return median(outside[1:]), median(inside[1:])


def cases(engine: Engine) -> dict[str, list[DecodingMode]]:
    """The modes of a batch, without its size."""
    exits = engine.model_config.exit_layers
    contrast = Contrast(exits[-1], exits[0])
    return {
        "Original": [Original()],
        "Contrast": [contrast],
        "mixed": [Original(), contrast, Exit(exits[0]), Contrast("original", exits[0])],
    }


def main(
    threads: int = 2,
    rounds: int = 9,
    new_tokens: int = 64,
    batch: Annotated[list[int] | None, typer.Option(help="sizes; 1 and 16 by default")] = None,
    folder: Annotated[Path, typer.Option(help="where checkpoints are kept")] = KEPT_CHECKPOINTS,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure on the demo model and on a tiny random GPT-2."""
    torch.set_num_threads(threads)
    models = {"demo": "demo", "tiny": make_checkpoint(TINY, folder, torch.float32)}
    rows: list[dict[str, Any]] = []
    for name, path in models.items():
        engine = Engine.from_pretrained(path, dtype="float32", backend="native")
        for size in batch or [1, 16]:
            for mode, pattern in cases(engine).items():
                if len(pattern) > size:
                    continue
                modes = [pattern[i % len(pattern)] for i in range(size)]
                for way, heat in (("greedy", 0.0), ("sampled", 1.0)):
                    params = SamplingParams(
                        max_new_tokens=new_tokens, temperature=heat, ignore_eos=True
                    )
                    outside, inside = measure(engine, modes, params, rounds)
                    rows.append(
                        {
                            "model": name,
                            "batch": size,
                            "mode": mode,
                            "choice": way,
                            "outside_us": outside,
                            "inside_us": inside,
                        }
                    )
    columns = ["model", "batch", "mode", "choice", "us outside", "us inside"]
    show("a step", columns, [_cells(row) for row in rows])
    write_json(json, rows)


def _cells(row: dict[str, Any]) -> list[str]:
    words = [str(row[key]) for key in ("model", "batch", "mode", "choice")]
    return [*words, f"{row['outside_us']:.0f}", f"{row['inside_us']:.0f}"]


if __name__ == "__main__":
    typer.run(main)
