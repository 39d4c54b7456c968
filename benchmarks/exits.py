"""Self-speculation beside plain decoding of the same engine, alternating in one run.

python benchmarks/exits.py --json results/exits.json
python benchmarks/exits.py --shape gpt2-medium --draft-exit 6 --oracle 0.8 --batch 1 --batch 8
python benchmarks/exits.py --target original --target contrast:original,12 ...

On a checkpoint with random weights exits never agree: ``--oracle`` then puts, with a seeded coin,
the target's own next token or another one in the place of each draft, after the draft was computed.
What it prints is a speed at a simulated acceptance, not a property of the model. With ``--tree``
modes that check further choices stand beside the chains; ``--second`` is how often the second
choice is right where the first is wrong.

Beside each gain stands what bytes and arithmetic would give if all ran at the machine's best speed.
"""

from __future__ import annotations

import gc
import random
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from checkpoints import SHAPES, demo_or_random
from report import alternate, median, show, write_json
from speculation_bound import SpeculationBound, rate_of
from torch import Tensor

from multiexit_engine import Engine, RequestOutput, SamplingParams, SelfSpeculative
from multiexit_engine.params import DecodingMode, parse_decoding
from multiexit_engine.runtime.rows.logit_rows import LogitRow

TEXTS = [
    "The old man looked at the sea and",
    "In the morning they went to the house of",
    "It was a dark night, and nobody",
    "She said that she had never seen",
]


class Oracle:
    """Drafts that are right with a given probability, and second choices where they are not."""

    def __init__(self, engine: Engine, rate: float, second: float) -> None:
        self.rate = rate
        self._second = second
        self._vocab_size = engine.model_config.vocab_size
        self.answers: dict[tuple[int, ...], list[int]] = {}
        drafter = engine._core.runner._drafter
        self._compute = drafter._tokens
        drafter._tokens = self._tokens  # type: ignore[method-assign]

    def _tokens(self, group: Any, picks: Any, number: int, flight: Any, drafts: Any) -> Tensor:
        computed = self._compute(group, picks, number, flight, drafts)
        rows = group.rows(number, flight.num_rows, drafts)
        return torch.tensor([self._choices(row, computed.shape[1]) for row in rows])

    def _choices(self, row: LogitRow, count: int) -> list[int]:
        prompt = tuple(row.sequence.request.prompt_token_ids)
        place = row.num_output_tokens
        right = self.answers[prompt][place]
        coin = random.Random(hash((prompt, place)))
        choices = [(right + i) % self._vocab_size for i in range(1, count + 1)]
        if coin.random() < self.rate:
            choices[0] = right
        elif coin.random() < self._second and count > 1:
            choices[1] = right
        return choices


def prompts_of(
    engine: Engine, count: int, *, is_real: bool, seed: int | None = None
) -> list[list[int]]:
    """Different prompts of some 32 tokens: text where the model knows any."""
    draw = random.Random(count if seed is None else seed)
    if is_real:
        return [
            engine.tokenizer(TEXTS[i % len(TEXTS)])["input_ids"] + [draw.randrange(200, 2000)]
            for i in range(count)
        ]
    size = engine.model_config.vocab_size
    return [[draw.randrange(size) for _ in range(32)] for _ in range(count)]


def measure(
    engine: Engine,
    modes: dict[str, DecodingMode],
    batch: int,
    new_tokens: int,
    rounds: int,
    oracle: Oracle | None,
) -> list[dict[str, Any]]:
    """One row for each mode: median tokens/s of the whole batch and the share of right drafts."""
    prompts = prompts_of(engine, batch, is_real=oracle is None)
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    target = modes["plain"]
    expected = [o.outputs[0].token_ids for o in engine.generate(prompts, sampling, target)]
    if oracle is not None:
        oracle.answers = {tuple(p): ids for p, ids in zip(prompts, expected, strict=True)}
    shares: dict[str, float] = {}
    per_step: dict[str, float] = {}

    def seconds_per_token(name: str) -> float:
        decoded = decode(engine, prompts, sampling, modes[name])
        assert decoded.tokens == expected, f"{name}: not the tokens of plain decoding"
        shares[name] = decoded.accepted / decoded.drafted if decoded.drafted else float("nan")
        per_step[name] = decoded.tokens_per_step
        return decoded.seconds_per_token

    runs = {name: partial(seconds_per_token, name) for name in modes}
    seconds = alternate(runs, rounds)
    plain = median(seconds["plain"])
    return [
        {
            "batch": batch,
            "mode": name,
            "tokens_per_s": 1 / median(values),
            "of_plain": plain / median(values),
            "accepted": shares[name],
            "tokens_per_step": per_step[name] / batch,
            "seconds_per_token": values,
        }
        for name, values in seconds.items()
    ]


class Decoded(NamedTuple):
    """What a batch gave, and how fast while all of it ran."""

    tokens: list[list[int]]
    seconds_per_token: float
    drafted: int
    accepted: int
    tokens_per_step: float


def decode(
    engine: Engine, prompts: list[list[int]], sampling: SamplingParams, mode: DecodingMode
) -> Decoded:
    """Continue all prompts; timed from when all have their first token until the first ends.

    Luck with drafts ends requests at different times; a server has others to take their place, so
    steps with fewer requests than the batch has are none of its speed.
    """
    before = engine.stats()
    names = [engine.add_request(prompt, sampling, mode) for prompt in prompts]
    outputs: dict[str, RequestOutput] = {}
    started: float | None = None
    seconds, first, timed_tokens, first_step, timed_steps = 0.0, 0, 0, 0, 0
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
        if started is None:
            if len(outputs) == len(names) and all(map(_num_tokens, outputs.values())):
                started = time.perf_counter()
                first, first_step = _progress(engine)
        elif not timed_tokens and any(output.finished for output in outputs.values()):
            seconds = time.perf_counter() - started
            num_tokens, num_steps = _progress(engine)
            timed_tokens, timed_steps = num_tokens - first, num_steps - first_step
    after = engine.stats()
    return Decoded(
        [outputs[name].outputs[0].token_ids for name in names],
        seconds / timed_tokens,
        after.num_drafted_tokens - before.num_drafted_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
        timed_tokens / timed_steps,
    )


def _progress(engine: Engine) -> tuple[int, int]:
    stats = engine.stats()
    return stats.num_generated_tokens, stats.num_steps


def _num_tokens(output: RequestOutput) -> int:
    return len(output.outputs[0].token_ids)


def simulations(oracle: list[float] | None) -> list[float | None]:
    """The acceptances to simulate; the model's own where none is named."""
    return [*oracle] if oracle else [None]


def measure_target(
    model: str | Path,
    name: str,
    rate: float | None,
    second: float,
    draft_exit: int,
    kind: torch.dtype,
    batches: list[int],
    draft_lens: list[int],
    trees: list[tuple[int, ...]],
    new_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """The rows of one target at one acceptance, at every batch size."""
    engine = Engine.from_pretrained(model, dtype=kind, prefix_caching=False)
    wanted = parse_decoding(name)
    modes: dict[str, DecodingMode] = {"plain": wanted}
    for length in ["auto", *draft_lens]:
        for tree in [(), *trees]:
            if length == "auto" or len(tree) <= length:
                mode = SelfSpeculative(draft_exit, length, wanted, tree=tree)  # type: ignore[arg-type]
                modes[_name(mode)] = mode
    bound = SpeculationBound.of(engine, draft_exit, kind)
    told = None if rate is None else Oracle(engine, rate, second)
    rows: list[dict[str, Any]] = []
    for size in batches:
        found = measure(engine, modes, size, new_tokens, rounds, told)
        rows += [{"target": name} | row for row in with_bounds(found, bound, rate, modes)]
    return rows


def _name(mode: SelfSpeculative) -> str:
    choices = ";".join(map(str, mode.choices))
    return f"draft {mode.draft_len}" + (f", tree {choices}" if choices else "")


def with_bounds(
    rows: list[dict[str, Any]],
    bound: SpeculationBound,
    rate: float | None,
    modes: dict[str, DecodingMode],
) -> list[dict[str, Any]]:
    """The rows with what each could gain at most, by the acceptance that the run had.

    That of a tree is its chain's.
    """
    lengths = {name: _length(mode) for name, mode in modes.items()}
    own = [
        rate_of(row["accepted"], length)
        for row in rows
        if (length := lengths[row["mode"]]) is not None
        and not _is_tree(modes[row["mode"]])
        and row["accepted"] == row["accepted"]
    ]
    rate = rate if rate is not None else sum(own) / len(own)
    for row in rows:
        is_plain = row["mode"] == "plain"
        length = lengths[row["mode"]]
        row["acceptance"] = rate
        row["bound"] = 1.0 if is_plain else bound.gain(rate, row["batch"], length)
    return rows


def _length(mode: DecodingMode) -> int | None:
    length = mode.draft_len if isinstance(mode, SelfSpeculative) else None
    return length if isinstance(length, int) else None


def _is_tree(mode: DecodingMode) -> bool:
    return isinstance(mode, SelfSpeculative) and bool(mode.choices)


def main(
    shape: Annotated[str, typer.Option(help="demo, " + ", ".join(SHAPES))] = "demo",
    draft_exit: int = 2,
    target: Annotated[list[str] | None, typer.Option(help="modes' command-line forms")] = None,
    oracle: Annotated[list[float] | None, typer.Option(help="simulated acceptances")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="requests at once")] = None,
    draft_len: Annotated[list[int] | None, typer.Option(help="fixed lengths beside auto")] = None,
    tree: Annotated[list[str] | None, typer.Option(help="choices such as 2 or 2;2")] = None,
    second: Annotated[float, typer.Option(help="simulated share of right second choices")] = 0.48,
    dtype: str = "float32",
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure self-speculation at several batch sizes."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    model = demo_or_random(shape, kind)
    trees = [tuple(map(int, own.split(";"))) for own in tree or []]
    lengths = draft_len or [2, 4]
    options = draft_exit, kind, batch or [1, 4, 16], lengths, trees, new_tokens, rounds
    rows: list[dict[str, Any]] = []
    for name, rate in product(target or ["original"], simulations(oracle)):
        # a new engine each time: it remembers what drafts were worth. The old one goes first, so
        # that there are huge pages left for the weights
        gc.collect()
        rows += measure_target(model, name, rate, second, *options)
    simulated = ", simulated acceptance" if oracle else ""
    title = f"{shape}, {dtype}, exit {draft_exit}, {threads} threads{simulated}"
    cells = [
        [
            row["target"],
            f"{row['acceptance']:.2f}",
            str(row["batch"]),
            row["mode"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['of_plain']:.2f}",
            f"{row['bound']:.2f}",
            f"{row['accepted']:.2f}",
            f"{row['tokens_per_step']:.2f}",
        ]
        for row in rows
    ]
    columns = ["target", "acceptance", "batch", "mode", "tokens/s", "of plain", "ideal"]
    show(title, [*columns, "drafts accepted", "tokens a step"], cells)
    write_json(json, rows)


if __name__ == "__main__":
    typer.run(main)
