"""Trees of drafts beside chains of the same length: tokens of a step, and what it takes.

python benchmarks/trees.py --json results/trees-demo.json
python benchmarks/trees.py --shape gpt2-medium --draft-exit 6 --dtype bfloat16 --oracle 0.6 ...

All modes continue the same prompts in turns, new prompts in each round. A step is timed while all
requests of the batch run; the median over all rounds counts, since a tree changes a step by less
than a neighbour on the machine does. With ``--oracle`` acceptances are simulated, see ``exits.py``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoints import SHAPES, demo_or_random
from exits import Oracle, prompts_of
from report import median, show, write_json

from multiexit_engine import Engine, Original, RequestOutput, SamplingParams, SelfSpeculative
from multiexit_engine.params import DecodingMode

TREES = {1: [(), (2,), (3,)], 2: [(), (2,), (2, 2)], 3: [(), (2,), (2, 2, 2)]}


@dataclass
class Steps:
    """Steps of one mode in which the whole batch ran."""

    seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


def decode(
    engine: Engine, prompts: list[list[int]], new_tokens: int, mode: DecodingMode, steps: Steps
) -> list[list[int]]:
    """Continue all prompts; their steps after the first tokens, until one ends, are noted."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    names = [engine.add_request(prompt, sampling, mode) for prompt in prompts]
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        before, is_steady = engine.stats(), len(outputs) == len(names)
        started = time.perf_counter()
        found = engine.step()
        seconds = time.perf_counter() - started
        outputs |= {output.request_id: output for output in found}
        if is_steady and not any(output.finished for output in outputs.values()):
            after = engine.stats()
            steps.seconds.append(seconds)
            steps.num_tokens += after.num_generated_tokens - before.num_generated_tokens
            steps.num_drafted += after.num_drafted_tokens - before.num_drafted_tokens
            steps.num_accepted += after.num_accepted_tokens - before.num_accepted_tokens
    return [outputs[name].outputs[0].token_ids for name in names]


def compare(
    engine: Engine,
    modes: dict[str, DecodingMode],
    batch: int,
    new_tokens: int,
    rounds: int,
    oracle: Oracle | None,
) -> list[dict[str, Any]]:
    """One row for each mode, the first of which is plain decoding."""
    steps = {name: Steps() for name in modes}
    for seed in range(rounds):
        prompts = prompts_of(engine, batch, is_real=oracle is None, seed=seed)
        expected: list[list[int]] = []
        for name, mode in modes.items():
            found = decode(engine, prompts, new_tokens, mode, steps[name])
            expected = expected or found
            assert found == expected, f"{name}: not the tokens of plain decoding"
            if oracle is not None:
                oracle.answers = {tuple(p): t for p, t in zip(prompts, expected, strict=True)}
    plain = _speed(next(iter(steps.values())))
    return [
        {
            "batch": batch,
            "mode": name,
            "tokens_per_step": own.num_tokens / len(own.seconds) / batch,
            "median_step_ms": 1e3 * median(own.seconds),
            "tokens_per_s": _speed(own),
            "of_plain": _speed(own) / plain,
            "drafted": own.num_drafted,
            "accepted": own.num_accepted,
            "steps": len(own.seconds),
        }
        for name, own in steps.items()
    ]


def _speed(steps: Steps) -> float:
    return steps.num_tokens / len(steps.seconds) / median(steps.seconds)


def main(
    shape: Annotated[str, typer.Option(help="demo, " + ", ".join(SHAPES))] = "demo",
    draft_exit: int = 2,
    oracle: Annotated[list[float] | None, typer.Option(help="simulated acceptances")] = None,
    second: Annotated[float, typer.Option(help="simulated share of right second choices")] = 0.48,
    batch: Annotated[list[int] | None, typer.Option(help="requests at once")] = None,
    draft_len: Annotated[list[int] | None, typer.Option(help="lengths of chains, 1 to 3")] = None,
    dtype: str = "float32",
    new_tokens: int = 64,
    rounds: int = 6,
    threads: int = 2,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure trees beside chains."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    model = demo_or_random(shape, kind)
    modes: dict[str, DecodingMode] = {"plain": Original()}
    for length in draft_len or [1, 2]:
        for tree in TREES[length]:
            name = f"draft {length}" + (f", tree {';'.join(map(str, tree))}" if tree else "")
            modes[name] = SelfSpeculative(draft_exit, length, tree=tree)
    engine = Engine.from_pretrained(model, dtype=kind, prefix_caching=False)
    told = Oracle(engine, 0.0, second) if oracle else None
    rows: list[dict[str, Any]] = []
    for rate in oracle or [None]:
        if told is not None and rate is not None:
            told.rate = rate
        for size in batch or [1, 4]:
            found = compare(engine, modes, size, new_tokens, rounds, told)
            rows += [{"simulated": rate} | row for row in found]
    columns = ["tokens_per_step", "median_step_ms", "tokens_per_s", "of_plain"]
    cells = [
        [str(row["simulated"]), str(row["batch"]), row["mode"]]
        + [f"{row[column]:.2f}" for column in columns]
        for row in rows
    ]
    title = f"{shape}, {dtype}, exit {draft_exit}, {threads} threads"
    show(title, ["simulated acceptance", "batch", "mode", *columns], cells)
    write_json(json, rows)


if __name__ == "__main__":
    typer.run(main)
