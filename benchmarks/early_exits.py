"""Early exit beside plain decoding of the same engine, alternating in one run, at a simulated rate.

python benchmarks/early_exits.py --batch 1 --json results/early-exits-gpt2-medium.json

Weights are random, so whether a row leaves is simulated: probes are computed as always, then each
row's chance is replaced by a number in [0, 1) made of its own state, the same in any company. With
a threshold of 1 - rate that share of the rows leaves at every exit it comes to. What it prints is a
speed at these rates, not a property of the model. Heads are asked for a probability that random
weights never give, so their codes decide wherever nobody wants to see the confidences; the nearer a
model's probabilities are to the threshold, the more rows read the heads themselves.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoints import KEPT_CHECKPOINTS, SHAPES, make_checkpoint
from report import alternate, median, show, timed, write_json
from torch import Tensor

from multiexit_engine import EarlyExit, Engine, Original, SamplingParams
from multiexit_engine.checkpoint.probes import ProbeWeights, probe_file, write_probes
from multiexit_engine.params import DecodingMode

UNITS = 64
SEEN = "the same, confidences reported"


def simulate(engine: Engine, layers: tuple[int, ...]) -> None:
    """Give the engine random probes whose answers are replaced after they were computed."""
    weights, hidden_size = engine.checkpoint.weights, engine.model_config.hidden_size
    draw = torch.Generator().manual_seed(0)
    made = {
        layer: ProbeWeights(
            torch.randn(UNITS, hidden_size, generator=draw),
            torch.zeros(UNITS),
            torch.randn(1, UNITS, generator=draw),
            torch.zeros(1),
        )
        for layer in layers
    }
    write_probes(probe_file(weights), made, weights)
    probes = engine._model.heads.probes
    compute = probes.chances

    def chances(layer: int, normed: Tensor) -> Tensor:
        compute(layer, normed)
        return (normed[:, :16].double().abs().sum(-1) * 1e3 % 1).float()

    probes.chances = chances  # type: ignore[method-assign]


def ways(layers: tuple[int, ...], rates: list[float]) -> dict[str, DecodingMode]:
    """Plain decoding, gates that nothing passes, and rates with either way to fill the cache."""
    found: dict[str, DecodingMode] = {
        "plain": Original(),
        "heads asked in vain": EarlyExit(0.9, "max_prob", layers),
        SEEN: EarlyExit(0.9, "max_prob", layers),
        "probes asked in vain": EarlyExit(2.0, "probe", layers),
    }
    for rate in rates:
        for kv in ("recompute", "copy"):
            found[f"rate {rate:g}, {kv}"] = EarlyExit(1 - rate, "probe", layers, kv=kv)  # type: ignore[arg-type]
    return found


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "gpt2-medium",
    layers: Annotated[str, typer.Option(help="exits that may be taken")] = "6,12",
    rate: Annotated[list[float] | None, typer.Option(help="share that leaves at each exit")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="requests at once")] = None,
    dtype: str = "float32",
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int = 2,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure early exit at several batch sizes."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    folder = make_checkpoint(SHAPES[shape], KEPT_CHECKPOINTS, kind)
    exits = tuple(map(int, layers.split(",")))
    engine = Engine.from_pretrained(
        folder,
        dtype=kind,
        prefix_caching=False,
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
    )
    simulate(engine, exits)
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    rows: list[dict[str, Any]] = []
    for size in batch or [1, 4]:
        draw = random.Random(size)
        vocab_size = engine.model_config.vocab_size
        prompts = [[draw.randrange(vocab_size) for _ in range(16)] for _ in range(size)]
        modes = ways(exits, rate or [0.3, 0.6, 0.9])
        params = {name: replace(sampling, confidences=name == SEEN) for name in modes}
        depths = {}
        for name, mode in modes.items():
            outputs = engine.generate(prompts, params[name], mode)
            left = [layer for output in outputs for layer in output.outputs[0].exit_layers]
            depths[name] = sum(left) / len(left)
        turns = {
            name: timed(partial(engine.generate, prompts, params[name], mode))
            for name, mode in modes.items()
        }
        seconds = alternate(turns, rounds)
        plain = median(seconds["plain"])
        rows += [
            {
                "batch": size,
                "mode": name,
                "mean_layer": depths[name],
                "tokens_per_s": size * new_tokens / median(values),
                "of_plain": plain / median(values),
                "seconds": values,
            }
            for name, values in seconds.items()
        ]
    cells = [
        [
            str(row["batch"]),
            row["mode"],
            f"{row['mean_layer']:.1f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['of_plain']:.2f}",
        ]
        for row in rows
    ]
    title = f"{shape}, {dtype}, exits {layers}, {threads} threads, simulated rates"
    show(title, ["batch", "mode", "mean layer", "tokens/s", "of plain"], cells)
    write_json(json, rows)


if __name__ == "__main__":
    typer.run(main)
