"""What the host does in a step that is launched whole, without the launches: microseconds.

python benchmarks/host_launches.py --json results/host-launches.json

On a CPU, with pieces that are captured as nothing: each runs once, and then costs a call of an
empty function, where a GPU's driver would launch its graph. So tokens are those
of the first steps for ever, and rows leave where they did then. What is timed is Python between the
end of one step and the next: scheduling, layouts, copies into pinned memory, results and texts.
Launched ahead, it passes while the device works.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from exits import prompts_of
from report import median, show, write_json

from multiexit_engine import Contrast, EarlyExit, Engine, Original, SamplingParams, SelfSpeculative
from multiexit_engine.params import DecodingMode
from multiexit_engine.runtime.device.graphs import Graphs, graph_sizes
from multiexit_engine.runtime.launched import launched_step
from multiexit_engine.runtime.launched.decode_steps import DecodeSteps

MODES: dict[str, DecodingMode] = {
    "plain": Original(),
    "contrast": Contrast("original", 4),
    "early, none leaves": EarlyExit(1.0),
    "early, all leave": EarlyExit(0.0),
    "3 drafts": SelfSpeculative(2, 3),
}
LENGTH = 512


class _Event:
    """An event of a device that has always come so far."""

    def record(self) -> None:
        """Nothing is to come."""

    def synchronize(self) -> None:
        """Nothing is waited for."""


def launching(batch: int, is_ahead: bool) -> Engine:
    """An engine on the CPU whose steps are launched as on a GPU."""
    engine = Engine.from_pretrained(
        "demo", device="cpu", dtype="float32", max_model_len=LENGTH, max_batch_size=batch
    )
    runner, core = engine._core.runner, engine._core
    parts = runner.kv_cache, runner._states, runner._chooser
    pieces = Graphs(graph_sizes(batch), LENGTH, capture=lambda call: lambda: None)
    runner._decode = DecodeSteps(engine._model, *parts, engine.config, pieces)
    core._steps._config = replace(engine.config, async_scheduling=is_ahead)
    return engine


def microseconds(engine: Engine, mode: DecodingMode, batch: int, num_steps: int) -> float:
    """The median of steps in which the whole batch gets tokens."""
    sampling = SamplingParams(max_new_tokens=LENGTH // 2, ignore_eos=True, confidences=False)
    for prompt in prompts_of(engine, batch, is_real=True):
        engine.add_request(prompt[:16], sampling, mode)
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        engine._core.step()
        seconds.append(time.perf_counter() - started)
    # the first ones read prompts, and run what is new
    return 1e6 * median(seconds[num_steps // 3 :])


def main(
    batch: Annotated[list[int] | None, typer.Option(help="requests at once")] = None,
    num_steps: int = 60,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Time the host's part of launched steps, one at a time and ahead."""
    torch.set_num_threads(1)
    launched_step.torch = SimpleNamespace(  # type: ignore[attr-defined]
        get_device_module=lambda _: SimpleNamespace(Event=_Event)
    )
    found = []
    for name, mode in MODES.items():
        for size in batch or [1, 8, 64]:
            own = [
                microseconds(launching(size, is_ahead), mode, size, num_steps)
                for is_ahead in (False, True)
            ]
            found.append({"mode": name, "batch": size, "alone": own[0], "ahead": own[1]})
    rows = [
        [str(own["mode"]), str(own["batch"]), f"{own['alone']:.0f}", f"{own['ahead']:.0f}"]
        for own in found
    ]
    show("us of the host in a launched step", ["mode", "batch", "alone", "ahead"], rows)
    write_json(json, found)


if __name__ == "__main__":
    typer.run(main)
