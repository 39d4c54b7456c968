"""Tokens per second of many requests: together, one after another, and by transformers.

python benchmarks/throughput.py --shape gpt-neo-125m --json results/throughput.json
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

from multiexit_engine import Contrast, DecodingMode, Engine, Exit, Original, SamplingParams


def measure(
    shape: Shape,
    folder: Path,
    dtype: torch.dtype,
    requests: int,
    prompt_len: int,
    new_tokens: int,
    rounds: int,
    backend: str,
) -> list[dict[str, object]]:
    """One row for each way of running ``requests`` greedy requests: median tokens/s."""
    path = make_checkpoint(shape, folder, dtype)
    engine = Engine.from_pretrained(
        path, dtype=dtype, backend=backend, prefix_caching=False, max_batch_size=requests
    )
    plain = load_transformers(shape, path, dtype)
    ibm = load_ibm_way(shape, path, dtype)
    prompts = torch.randint(0, shape.config.vocab_size, (requests, prompt_len)).tolist()
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    contrast = Contrast(shape.upper, shape.lower)
    mixed: list[DecodingMode] = [Original(), contrast, Exit(shape.upper), Exit(shape.lower)]
    modes = [mixed[i % len(mixed)] for i in range(requests)]
    runs = {
        "engine Original, together": lambda: engine.generate(prompts, params, Original()),
        "engine Original, one by one": lambda: [engine.generate(p, params) for p in prompts],
        "engine Contrast, together": lambda: engine.generate(prompts, params, contrast),
        "engine four modes mixed": lambda: engine.generate(prompts, params, modes),
        "transformers, one batch": lambda: generate(plain, prompts, new_tokens),
        "IBM's way, one batch": lambda: generate(ibm, prompts, new_tokens),
    }
    seconds = alternate(runs, rounds)
    return [
        {
            "shape": shape.name,
            "backend": backend,
            "dtype": str(dtype).removeprefix("torch."),
            "requests": requests,
            "way": name,
            "tokens_per_s": requests * new_tokens / median(values),
            "seconds": values,
        }
        for name, values in seconds.items()
    ]


def main(
    shape: Annotated[list[str] | None, typer.Option(help="of " + ", ".join(SHAPES))] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    requests: int = 16,
    prompt_len: int = 32,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int = 2,
    backend: Annotated[str, typer.Option(help="of the engine: auto, reference or native")] = "auto",
    folder: Annotated[Path, typer.Option(help="where checkpoints are kept")] = KEPT_CHECKPOINTS,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure the throughput of concurrent requests on random-weight models."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = []
    for name in shape or ["gpt2-medium", "gpt-neo-125m"]:
        found = measure(
            SHAPES[name],
            folder,
            getattr(torch, dtype),
            requests,
            prompt_len,
            new_tokens,
            rounds,
            backend,
        )
        base = found[1]["tokens_per_s"]
        rows = [
            [
                str(row["way"]),
                f"{row['tokens_per_s']:.1f}",
                f"{row['tokens_per_s'] / base:.2f}",  # type: ignore[operator]
            ]
            for row in found
        ]
        title = (
            f"{name}, {dtype}, {requests} requests, {prompt_len} + {new_tokens} tokens, {backend}"
        )
        show(title, ["way", "tokens/s", "of one by one"], rows)
        results += found
    write_json(json, shlex.join(["python", *sys.argv]), results)


if __name__ == "__main__":
    typer.run(main)
