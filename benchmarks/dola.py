"""Tokens per second of DoLa beside plain decoding, and beside DoLa as transformers 4.55 had it.

python benchmarks/dola.py --batches 1 16 --json benchmarks/results/dola.json

Random weights, in one process, all ways in turn. With several requests transformers' way takes one
premature layer for all of them, the engine one for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from checkpoints import KEPT_CHECKPOINTS, SHAPES, Shape, make_checkpoint
from peer_process import Answer
from peers import generate, load_dola_way, load_transformers
from report import median, show, timed, write_json
from ways import Way, engine_way, load_engine, measure

from multiexit_engine import DoLa, Original
from multiexit_engine.decoding.plan import dola_layers

PROMPT_LEN, NEW_TOKENS = 32, 48


def main() -> None:
    """Parse the options, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="gpt-neo-125m")
    parser.add_argument("--candidates", choices=["low", "high"], default="high")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine-only", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    checkpoint = make_checkpoint(shape, KEPT_CHECKPOINTS, torch.float32)
    results = []
    for weights in options.weights:
        layers = dola_layers(options.candidates, shape.config.num_hidden_layers, True)
        mode = DoLa(layers, jsd="reference")
        for batch in options.batches:
            ways = ways_of(shape, checkpoint, weights, mode, batch, options.engine_only)
            measure(ways, options.rounds)
            results += figures(ways, batch)
    show(
        f"{shape.name}, {PROMPT_LEN} + {NEW_TOKENS} tokens, {options.threads} threads",
        ["way", "weights", "batch", "tokens/s", "of the engine's Original", "ids of DoLa"],
        [[r["way"], r["weights"], str(r["batch"]), f"{r['tokens_per_s']:.1f}",
          f"{r['of_original']:.2f}", r["agreement"]] for r in results],
    )  # fmt: skip
    write_json(options.json, results)


def ways_of(
    shape: Shape, checkpoint: Path, weights: str, mode: DoLa, batch: int, engine_only: bool
) -> list[Way]:
    """The engine's two, and transformers' two unless ``engine_only``."""
    generator = torch.Generator().manual_seed(batch)
    vocab_size = shape.config.vocab_size
    prompts = torch.randint(vocab_size, (batch, PROMPT_LEN), generator=generator).tolist()
    engine = load_engine(checkpoint, shape, weights, "auto", batch)
    dtype = getattr(torch, weights)
    peers = {}
    if not engine_only:
        peers["transformers"] = load_transformers(shape, checkpoint, dtype)
        peers["transformers, DoLa"] = load_dola_way(shape, checkpoint, dtype, mode.candidates)
    ours = {"Original": Original(), "DoLa": mode}
    return [
        *(
            engine_way(engine, name, weights, way, prompts, NEW_TOKENS)
            for name, way in ours.items()
        ),
        *(peer_way(name, weights, model, prompts) for name, model in peers.items()),
    ]


def peer_way(name: str, weights: str, model: Any, prompts: list[list[int]]) -> Way:
    """Greedy tokens of a model of transformers."""

    def run() -> Answer:
        tokens: list[list[int]] = []
        seconds = timed(lambda: tokens.extend(generate(model, prompts, NEW_TOKENS)))()
        return Answer(tokens, seconds)

    return Way(name, weights, name, run, len(prompts) * NEW_TOKENS)


def figures(ways: list[Way], batch: int) -> list[dict[str, Any]]:
    """A row for each way."""
    rates = {way.name: way.num_tokens / median(way.seconds) for way in ways}
    tokens = {way.name: way.tokens for way in ways}
    theirs = tokens.get("transformers, DoLa", [])
    same = sum(own == other for own, other in zip(tokens["engine DoLa"], theirs, strict=False))
    return [
        {
            "way": way.name,
            "weights": way.weights,
            "batch": batch,
            "tokens_per_s": rates[way.name],
            "of_original": rates[way.name] / rates["engine Original"],
            "agreement": f"{same} of {batch}" if way.name == "transformers, DoLa" else "",
            "seconds": way.seconds,
        }
        for way in ways
    ]


if __name__ == "__main__":
    main()
