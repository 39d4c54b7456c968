"""Tokens per second at batch 1: this engine, transformers, and IBM's way, in turn.

python benchmarks/latency.py --shape gpt2-medium --json results/latency.json
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from checkpoints import KEPT_CHECKPOINTS, SHAPES, Shape, make_checkpoint
from peers import generate, load_ibm_way, load_transformers
from report import alternate, median, show, write_json

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams


def measure(
    shape: Shape,
    folder: Path,
    dtype: torch.dtype,
    prompt_len: int,
    new_tokens: int,
    rounds: int,
    backend: str,
) -> list[dict[str, object]]:
    """One row for each way of decoding: median tokens/s and milliseconds per token."""
    path = make_checkpoint(shape, folder, dtype)
    engine = Engine.from_pretrained(path, dtype=dtype, backend=backend, prefix_caching=False)
    plain = load_transformers(shape, path, dtype)
    ibm = load_ibm_way(shape, path, dtype)
    prompt = torch.randint(0, shape.config.vocab_size, (prompt_len,)).tolist()
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    contrast = Contrast(shape.upper, shape.lower)
    runs = {
        "engine Original": lambda: engine.generate(prompt, params, Original()),
        f"engine Contrast({shape.upper},{shape.lower})": (
            lambda: engine.generate(prompt, params, contrast)
        ),
        f"engine Exit({shape.lower})": lambda: engine.generate(prompt, params, Exit(shape.lower)),
        "transformers": lambda: generate(plain, [prompt], new_tokens),
        f"IBM's way ({shape.upper},{shape.lower})": lambda: generate(ibm, [prompt], new_tokens),
    }
    seconds = alternate(runs, rounds)
    return [
        {
            "shape": shape.name,
            "backend": backend,
            "dtype": str(dtype).removeprefix("torch."),
            "way": name,
            "tokens_per_s": new_tokens / median(values),
            "ms_per_token": 1000 * median(values) / new_tokens,
            "seconds": values,
        }
        for name, values in seconds.items()
    ]


def main(
    shape: Annotated[list[str] | None, typer.Option(help="of " + ", ".join(SHAPES))] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    prompt_len: int = 32,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    backend: Annotated[str, typer.Option(help="of the engine: auto, reference or native")] = "auto",
    folder: Annotated[Path, typer.Option(help="where checkpoints are kept")] = KEPT_CHECKPOINTS,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure batch-1 decoding of random-weight models."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = []
    for name in shape or ["gpt2-medium", "gpt-neo-125m"]:
        found = measure(
            SHAPES[name], folder, getattr(torch, dtype), prompt_len, new_tokens, rounds, backend
        )
        base = found[0]["tokens_per_s"]
        rows = [
            [
                str(row["way"]),
                f"{row['tokens_per_s']:.1f}",
                f"{row['ms_per_token']:.2f}",
                f"{row['tokens_per_s'] / base:.2f}",  # type: ignore[operator]
            ]
            for row in found
        ]
        lengths = f"{prompt_len} + {new_tokens} tokens"
        title = f"{name}, {dtype}, batch 1, {lengths}, {threads} threads, {backend}"
        show(title, ["way", "tokens/s", "ms/token", "of Original"], rows)
        results += found
    write_json(json, shlex.join(["python", *sys.argv]), results)


if __name__ == "__main__":
    typer.run(main)
