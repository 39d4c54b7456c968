"""Greedy answers of T5: transformers and this engine in turn.

python benchmarks/encoder_decoders.py --sizes small base --json benchmarks/results/t5.json

Random weights of T5's published sizes, sources of 64 tokens, answers of 32, in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from report import alternate, median, show, timed, write_json
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from multiexit_engine import Engine, SamplingParams

SOURCE_LEN, TARGET_LEN = 64, 32
SIZES = {
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}


def main() -> None:
    """Parse the options, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for size in options.sizes:
        model = random_model(size)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            engine = Engine.from_pretrained(folder, dtype=options.dtype, prefix_caching=False)
        model = model.to(getattr(torch, options.dtype))
        for batch in options.batches:
            theirs, ours = measured(model, engine, batch, options.rounds)
            found = {"size": size, "batch": batch, "dtype": options.dtype}
            results.append({**found, "transformers_ms": 1e3 * theirs, "engine_ms": 1e3 * ours})
    show(
        f"{SOURCE_LEN} source tokens, {TARGET_LEN} target tokens, {options.threads} threads",
        ["size", "batch", "transformers ms", "engine ms", "times"],
        [[r["size"], str(r["batch"]), f"{r['transformers_ms']:.0f}", f"{r['engine_ms']:.0f}",
          f"{r['transformers_ms'] / r['engine_ms']:.1f}x"] for r in results],
    )  # fmt: skip
    write_json(options.json, results)


def random_model(size: str) -> T5ForConditionalGeneration:
    """T5 of a published size."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **SIZES[size])).eval()


def measured(
    model: T5ForConditionalGeneration, engine: Engine, batch: int, rounds: int
) -> tuple[float, float]:
    """Median seconds of both for a batch of random sources."""
    generator = torch.Generator().manual_seed(batch)
    sources = torch.randint(3, 32000, (batch, SOURCE_LEN), generator=generator)
    sampling, lists = SamplingParams(max_new_tokens=TARGET_LEN, ignore_eos=True), sources.tolist()
    turns = {
        "transformers": timed(lambda: greedy(model, sources)),
        "engine": timed(lambda: engine.generate(lists, sampling)),
    }
    seconds = alternate(turns, rounds)
    return median(seconds["transformers"]), median(seconds["engine"])


@torch.inference_mode()
def greedy(model: T5ForConditionalGeneration, sources: Tensor) -> Tensor:
    """The generation of transformers, always of the full length."""
    return model.generate(
        sources, attention_mask=torch.ones_like(sources), do_sample=False,
        min_new_tokens=TARGET_LEN, max_new_tokens=TARGET_LEN,
    )  # fmt: skip


if __name__ == "__main__":
    main()
