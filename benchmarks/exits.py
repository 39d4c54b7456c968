"""Self-speculation beside plain decoding of the same engine, alternating in one run.

python benchmarks/exits.py --json results/exits.json
python benchmarks/exits.py --shape gpt2-medium --draft-exit 6 --oracle 0.8 --batch 1 --batch 8

On a checkpoint with random weights exits never agree: ``--oracle`` then puts, with a seeded coin,
the target's own next token or another one in the place of each draft, after the draft was computed.
What it prints is a speed at a simulated acceptance, not a property of the model.
"""

from __future__ import annotations

import random
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoints import KEPT_CHECKPOINTS, SHAPES, make_checkpoint
from report import alternate, median, show, timed, write_json
from torch import Tensor

from multiexit_engine import Engine, SamplingParams, SelfSpeculative
from multiexit_engine.params import DecodingMode, parse_decoding
from multiexit_engine.runtime.choosing import LogitSlice

TEXTS = [
    "The old man looked at the sea and",
    "In the morning they went to the house of",
    "It was a dark night, and nobody",
    "She said that she had never seen",
]


class Oracle:
    """Drafts that are right with a given probability."""

    def __init__(self, engine: Engine, rate: float) -> None:
        self._rate = rate
        self._vocab_size = engine.model_config.vocab_size
        self.answers: dict[tuple[int, ...], list[int]] = {}
        chooser = engine._core.runner._chooser
        self._compute = chooser.drafts
        chooser.drafts = self._drafts  # type: ignore[method-assign]

    def _drafts(self, part: LogitSlice, num_tokens: int) -> Tensor:
        self._compute(part, num_tokens)
        return torch.tensor([self._draft(row) for row in part.rows])

    def _draft(self, row: Any) -> int:
        prompt = tuple(row.sequence.request.prompt_token_ids)
        place = row.num_output_tokens
        right = self.answers[prompt][place]
        is_right = random.Random(hash((prompt, place))).random() < self._rate
        return right if is_right else (right + 1) % self._vocab_size


def prompts_of(engine: Engine, count: int, *, is_real: bool) -> list[list[int]]:
    """Different prompts of some 32 tokens: text where the model knows any."""
    draw = random.Random(count)
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
    for name, mode in modes.items():
        before = engine.stats()
        found = [o.outputs[0].token_ids for o in engine.generate(prompts, sampling, mode)]
        after = engine.stats()
        assert found == expected, f"{name}: not the tokens of plain decoding"
        drafted = after.num_drafted_tokens - before.num_drafted_tokens
        accepted = after.num_accepted_tokens - before.num_accepted_tokens
        shares[name] = accepted / drafted if drafted else float("nan")
    runs = {
        name: timed(partial(engine.generate, prompts, sampling, mode))
        for name, mode in modes.items()
    }
    seconds = alternate(runs, rounds)
    plain = median(seconds["plain"])
    return [
        {
            "batch": batch,
            "mode": name,
            "tokens_per_s": batch * new_tokens / median(values),
            "of_plain": plain / median(values),
            "accepted": shares[name],
            "seconds": values,
        }
        for name, values in seconds.items()
    ]


def main(
    shape: Annotated[str, typer.Option(help="demo, " + ", ".join(SHAPES))] = "demo",
    draft_exit: int = 2,
    target: Annotated[str, typer.Option(help="a mode's command-line form")] = "original",
    oracle: Annotated[float | None, typer.Option(help="simulated acceptance")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="requests at once")] = None,
    draft_len: Annotated[list[int] | None, typer.Option(help="fixed lengths beside auto")] = None,
    dtype: str = "float32",
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure self-speculation at several batch sizes."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    model = "demo" if shape == "demo" else make_checkpoint(SHAPES[shape], KEPT_CHECKPOINTS, kind)
    engine = Engine.from_pretrained(model, dtype=kind, prefix_caching=False)
    wanted = parse_decoding(target)
    modes: dict[str, DecodingMode] = {"plain": wanted}
    for length in ["auto", *(draft_len or [2, 4])]:
        modes[f"draft {length}"] = SelfSpeculative(draft_exit, length, wanted)  # type: ignore[arg-type]
    told = None if oracle is None else Oracle(engine, oracle)
    rows = []
    for size in batch or [1, 4, 16]:
        rows += measure(engine, modes, size, new_tokens, rounds, told)
    simulated = f", simulated acceptance {oracle}" if oracle is not None else ""
    title = f"{shape}, {dtype}, target {target}, exit {draft_exit}, {threads} threads{simulated}"
    cells = [
        [
            str(row["batch"]),
            row["mode"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['of_plain']:.2f}",
            f"{row['accepted']:.2f}",
        ]
        for row in rows
    ]
    show(title, ["batch", "mode", "tokens/s", "of plain", "drafts accepted"], cells)
    write_json(json, shlex.join(["python", *sys.argv]), rows)


if __name__ == "__main__":
    typer.run(main)
