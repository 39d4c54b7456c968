"""Where the time of a decode step goes: microseconds of each of its parts, on a CPU.

python benchmarks/host_cost.py --json results/host-cost-demo.json
python benchmarks/host_cost.py --shape gpt2-medium --draft-exit 6 --dtype bfloat16

The functions in which a part begins are wrapped, and the time of a part is that of its functions
less what other parts take within them; the wrappers cost some microseconds a step, which the last
column leaves out. Steps count in which the whole batch gets tokens. On random weights all drafts
are wrong, which costs a step as much as right ones.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoints import SHAPES, demo_or_random
from exits import prompts_of
from report import median, show, write_json

from multiexit_engine import _C, Engine, Original, SamplingParams, SelfSpeculative
from multiexit_engine.batch import ForwardBatch
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.params import DecodingMode
from multiexit_engine.runtime import runner
from multiexit_engine.runtime.core import EngineCore
from multiexit_engine.runtime.drafts.round_batches import RoundBatches
from multiexit_engine.runtime.rows.choosing import TokenChooser
from multiexit_engine.runtime.rows.flight import Flight
from multiexit_engine.runtime.runner import ModelRunner
from multiexit_engine.runtime.scheduling.draft_lengths import DraftLengths
from multiexit_engine.runtime.scheduling.scheduler import Scheduler

REST = "the rest of the step"
PARTS: dict[str, list[tuple[Any, str]]] = {
    "scheduling": [(Scheduler, "schedule"), (Scheduler, "advance"), (Scheduler, "accept_drafts")],
    "draft lengths": [(DraftLengths, "of"), (DraftLengths, "record")],
    "rows and plans": [
        (runner, "choice_rows"),
        (runner, "target_rows"),
        (runner, "plan_segments"),
        (TokenChooser, "slices"),
        (TokenChooser, "scored_slices"),
        (TokenChooser, "joined"),
    ],
    "batches": [(ForwardBatch, "build"), (RoundBatches, "__init__"), (RoundBatches, "forward")],
    "embeddings": [(MultiExitModel, "embed")],
    "layers, in Python": [(MultiExitModel, "run_layers")],
    "rows that come and go": [
        (Flight, "__init__"),
        (Flight, "join"),
        (Flight, "keep"),
        (Flight, "take"),
        (Flight, "rows_of"),
    ],
    "choosing, in Python": [
        (TokenChooser, "choose"),
        (TokenChooser, "draws"),
        (TokenChooser, "direct_drafts"),
    ],
    "outputs": [(EngineCore, "_update"), (runner, "hand_out")],
    "the runner": [(ModelRunner, "run")],
}
KERNELS = {"decoder_blocks": "layers, in C++"}


class Parts:
    """Seconds of the parts of the step that runs, each without the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time counts to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[name] += taken - self._inner.pop()
                self._inner[-1] += taken

        return call

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wrap all functions in which a part begins."""
        wrapped = [(name, *place) for name, places in PARTS.items() for place in places]
        wrapped += [
            (KERNELS.get(name, "heads and norms, in C++"), _C, name)
            for name, function in vars(_C).items()
            if callable(function) and not isinstance(function, type)
        ]
        plain = [(owner, name, vars(owner)[name]) for _, owner, name in wrapped]
        for part, owner, name in wrapped:
            function = vars(owner)[name]
            is_bound = isinstance(function, classmethod)
            timed = self.timed(part, function.__func__ if is_bound else function)
            setattr(owner, name, classmethod(timed) if is_bound else timed)
        try:
            yield
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)


def steps_of(
    engine: Engine, mode: DecodingMode, prompts: list[list[int]], new_tokens: int, parts: Parts
) -> list[dict[str, float]]:
    """Seconds of the parts, and of all, of each step of a batch between its first and last ones."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    names = [engine.add_request(p, sampling, mode, streamed=False) for p in prompts]
    core, found = engine._core, []
    while all(name in core.requests for name in names):
        parts.seconds.clear()
        started = time.perf_counter()
        changed = core.step()
        seconds = time.perf_counter() - started
        found.append({**parts.seconds, "all": seconds})
        if any(request.is_finished for request in changed):
            break
    for name in names:
        engine.abort(name)
    # in the first two steps prompts are read, and drafts have no times yet
    return found[2:-1]


def measure(engine: Engine, mode: DecodingMode, batch: int, rounds: int, new_tokens: int) -> Any:
    """Median microseconds of each part of a step, and of a step without wrappers."""
    parts, split, whole = Parts(), [], []
    for number in range(rounds + 1):
        prompts = prompts_of(engine, batch, is_real=engine.tokenizer is not None)
        with parts.running():
            own = steps_of(engine, mode, prompts, new_tokens, parts)
        bare = steps_of(engine, mode, prompts, new_tokens, Parts())
        if number:
            split += own
            whole += [step["all"] for step in bare]
    names = [*PARTS, *KERNELS.values(), "heads and norms, in C++"]
    found = {name: 1e6 * median([step.get(name, 0.0) for step in split]) for name in names}
    total = 1e6 * median([step["all"] for step in split])
    return found | {REST: total - sum(found.values()), "all": 1e6 * median(whole)}


def main(
    shape: Annotated[str, typer.Option(help="demo, " + ", ".join(SHAPES))] = "demo",
    draft_exit: int = 2,
    draft_len: int = 1,
    batch: Annotated[list[int] | None, typer.Option(help="requests at once")] = None,
    dtype: str = "float32",
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Split plain steps, and those of a chain of drafts with its check."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    model = demo_or_random(shape, kind)
    engine = Engine.from_pretrained(model, dtype=kind, prefix_caching=False, backend="native")
    modes: dict[str, DecodingMode] = {
        "plain": Original(),
        f"{draft_len} drafts": SelfSpeculative(draft_exit, draft_len),
    }
    columns = {
        f"{name}, batch {size}": measure(engine, mode, size, rounds, new_tokens)
        for size in batch or [1, 8]
        for name, mode in modes.items()
    }
    names = next(iter(columns.values()))
    rows = [[name, *(f"{own[name]:.0f}" for own in columns.values())] for name in names]
    show(f"{shape}, {dtype}, {threads} threads: us of a step", ["part", *columns], rows)
    write_json(json, [{"case": name, **own} for name, own in columns.items()])


if __name__ == "__main__":
    typer.run(main)
