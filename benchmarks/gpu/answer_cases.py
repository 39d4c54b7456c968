"""Answers of 32 tokens to sources of 64: one token after the other, or all at once with exits.

``benchmarks/nar.py`` on a GPU: random weights of BART-base's size, in bfloat16.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nar import MASK, SOURCE_LEN, TARGET_LEN, autoregressive, modes, save
from report import alternate, median
from transformers import BartConfig, BartForConditionalGeneration

from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.step_cases import CONDITIONAL
from benchmarks.gpu.timing import COMPILES_ONLY, DEVICE, sized

LAYERS, WIDTH, VOCAB = sized((6, 768, 50265), (2, 32, 50265))
BATCHES = sized((1, 16, 64), (2,))
ROUNDS = 1 if COMPILES_ONLY else sized(5, 1)
# answers of 1 and 16 requests; sources of more have more tokens than are captured
ROWS, CAPTURED_BATCH = (32, 512), 16
# of an engine that writes one token after the other
KV_BYTES = sized(2**30, 2**24)


class _Made(NamedTuple):
    engines: dict[str, Any]
    model: Any


def cases(_: Card) -> Iterator[Case]:
    """Microseconds of an answer by batch and way."""
    made = Once(_make)
    for batch in BATCHES:
        yield Case({"batch": batch}, partial(_lines, made, batch))


def _lines(made: Once[_Made], batch: int) -> list[dict[str, Any]]:
    turns = alternate(_turns(*made(), batch), ROUNDS)
    return [{"way": way, "us": 1e6 * median(seconds)} for way, seconds in turns.items()]


def _make() -> _Made:
    from multiexit_engine import Engine

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH,
        encoder_attention_heads=WIDTH // sized(64, 16),
        decoder_attention_heads=WIDTH // sized(64, 16),
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        save(model, torch.randn(WIDTH, 2 * WIDTH) * 0.02, Path(folder))
        kept = {"device": DEVICE, "dtype": sized("bfloat16", "float32")}
        kept["backend"] = sized("native", "reference")
        one_by_one = {**kept, "architecture": "bart", "kv_cache_memory": KV_BYTES}
        engines = {
            "engine": Engine.from_pretrained(folder, **kept),
            "BART": Engine.from_pretrained(folder, **one_by_one),
        }
        if DEVICE == "cuda" and not COMPILES_ONLY:
            engines["BART, captured"] = Engine.from_pretrained(
                folder, **one_by_one, cuda_graphs=BATCHES
            )
            engines["captured"] = Engine.from_pretrained(folder, **kept, cuda_graphs=ROWS)
            if any(CONDITIONAL.values()):
                engines["captured, conditional nodes"] = Engine.from_pretrained(
                    folder, **kept, cuda_graphs=ROWS, **CONDITIONAL
                )
    return _Made(engines, model.to(DEVICE, sized(torch.bfloat16, torch.float32)))


def _turns(engines: dict[str, Any], model: Any, batch: int) -> dict[str, Callable[[], float]]:
    generator = torch.Generator().manual_seed(batch)
    sources = torch.randint(3, MASK, (batch, SOURCE_LEN), generator=generator)
    lists, there = sources.tolist(), sources.to(DEVICE)
    turns = {"transformers greedy": _timed(lambda: autoregressive(model, there, 1))}
    for kind, engine in engines.items():
        if kind.startswith("captured") and batch > CAPTURED_BATCH:
            continue
        for name, sampling, mode in _ways(kind):
            answer = partial(engine.generate, lists, sampling, mode, progress=False)
            # what is captured or compiled on the way is no part of an answer
            answer()
            turns[f"{kind} {name}"] = _timed(answer)
    return turns


def _ways(kind: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, sampling and mode of what a kind of engine does."""
    from multiexit_engine import Original, SamplingParams

    if kind.startswith("BART"):
        yield "greedy", SamplingParams(max_new_tokens=TARGET_LEN, ignore_eos=True), Original()
        return
    for name, mode in modes().items():
        if mode.layers is None or max(mode.layers) <= LAYERS:
            yield name, SamplingParams(ignore_eos=True), mode


def _timed(run: Callable[[], object]) -> Callable[[], float]:
    """Wall time, the ids on the host included; NaN without a GPU."""

    def turn() -> float:
        started = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started if DEVICE == "cuda" else float("nan")

    return turn
