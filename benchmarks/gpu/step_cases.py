"""Decode steps of the whole engine, from Python, as graphs, and launched ahead."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import DEVICE, sized

LAYERS, EXIT = sized((24, 12), (2, 1))
SHAPE = sized(
    {"n_embd": 1024, "n_head": 16, "vocab_size": 50257, "n_positions": 1024},
    {"n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 64},
)
BATCHES = sized((1, 8, 64), (2,))
PROMPT_LEN = sized(128, 4)
WARM_STEPS, TIMED_STEPS = sized((12, 48), (2, 2))
# off a GPU the options are refused, and no time is given anyway
WAYS = {
    "python": {},
    "graphs": sized({"cuda_graphs": True}, {}),
    "graphs, ahead": sized({"cuda_graphs": True, "async_scheduling": True}, {}),
}


def measure() -> list[dict[str, Any]]:
    """Microseconds of a decode step of GPT-2-medium's shape with random weights, in bfloat16."""
    rows = []
    with _checkpoint() as folder:
        for way, options in WAYS.items():
            engine = _engine(folder, options)
            rows += [
                {"way": way, "mode": name, "rows": size, "step_us": _step_us(engine, modes, size)}
                for name, modes in _modes().items()
                for size in BATCHES
            ]
            del engine
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    return rows


def _modes() -> dict[str, list[Any]]:
    from multiexit_engine import Contrast, Exit, Original

    contrast = Contrast(LAYERS, EXIT)
    return {
        "original": [Original()],
        "contrast": [contrast],
        "mixed": [Original(), contrast, Exit(EXIT)],
    }


@contextmanager
def _checkpoint() -> Iterator[Path]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, **SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
        yield Path(folder)


def _engine(folder: Path, options: dict[str, Any]) -> Any:
    from multiexit_engine import Engine

    return Engine.from_pretrained(
        folder,
        device=DEVICE,
        dtype=sized("bfloat16", "float32"),
        backend=sized("native", "reference"),
        vocab_projection_mode="shared_projection_direct",
        lm_head_layer_indices=(EXIT, LAYERS),
        max_batch_size=max(BATCHES),
        prefix_caching=False,
        **options,
    )


def _step_us(engine: Any, modes: list[Any], size: int) -> float:
    """Median wall time of a step, tokens on the host included; NaN without a GPU."""
    from multiexit_engine import SamplingParams

    num_steps = WARM_STEPS + TIMED_STEPS
    sampling = SamplingParams(max_new_tokens=num_steps + 8, ignore_eos=True)
    names = [
        engine.add_request([5 + i] * PROMPT_LEN, sampling, modes[i % len(modes)], streamed=False)
        for i in range(size)
    ]
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step_pieces()
        times.append(time.perf_counter() - start)
    for name in names:
        engine.abort(name)
    return statistics.median(times[WARM_STEPS:]) * 1e6 if DEVICE == "cuda" else float("nan")
