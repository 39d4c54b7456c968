"""Decode steps of the whole engine, from Python, as graphs, and launched ahead."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.timing import COMPILES_ONLY, DEVICE, sized
from multiexit_engine._cuda.library import PATH
from multiexit_engine.kernels.overlap import one_after_the_other

LAYERS, EXIT = sized((24, 12), (2, 1))
SHAPE = sized(
    {"n_embd": 1024, "n_head": 16, "vocab_size": 50257, "n_positions": 1024},
    {"n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 64},
)
BATCHES = sized((1, 8, 64), (2,))
PROMPT_LEN = sized(128, 4)
WARM_STEPS, TIMED_STEPS = sized((12, 48), (2, 2)) if not COMPILES_ONLY else (3, 1)
# off a GPU the options are refused, and no time is given anyway
WAYS = {
    "python": {},
    "graphs": sized({"cuda_graphs": True}, {}),
    "graphs, ahead": sized({"cuda_graphs": True, "async_scheduling": True}, {}),
}
# the device passes over layers that nobody is left for; where the CUDA kernels are built
CONDITIONAL = sized({"conditional_nodes": PATH.exists()}, {})
# what the launches of a block do for each other is left out
APART = "graphs, launches one after the other"
# all layers of a few rows are one launch; where the CUDA kernels are built
STAYING = "graphs, layers in one launch"
PERSISTENT = sized({"cuda_graphs": True, "persistent_blocks": True}, {})
FEW = sized((1, 4), (2,))


def cases(_: Card) -> Iterator[Case]:
    """Microseconds of a decode step of GPT-2-medium's shape with random weights, in bfloat16."""
    with checkpoint() as folder:
        for way, options in WAYS.items():
            yield from _steps(folder, way, options, _wishes(), nullcontext, BATCHES)
            if COMPILES_ONLY:
                return
        plain = {name: _wishes()[name] for name in ("original", "contrast")}
        yield from _steps(folder, APART, WAYS["graphs"], plain, one_after_the_other, BATCHES)
        if sized(PATH.exists(), True):
            yield from _steps(folder, STAYING, PERSISTENT, plain, nullcontext, FEW)


def _steps(
    folder: Path,
    way: str,
    options: dict[str, Any],
    wishes: dict[str, _Wish],
    launched: Callable[[], AbstractContextManager[None]],
    sizes: tuple[int, ...],
) -> Iterator[Case]:
    """One line for each wish and number of rows, of one engine."""
    engine = Once(partial(new_engine, folder, options))

    def measured(wish: _Wish, size: int) -> dict[str, float]:
        with launched():
            try:
                return _step(engine(), wish, size)
            except Exception:
                engine.forget()  # its queues are in no known state
                raise

    for name, wish in wishes.items():
        for size in sizes:
            yield Case({"way": way, "mode": name, "rows": size}, partial(measured, wish, size))
    engine.forget()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


class _Wish(NamedTuple):
    """What requests of a step ask for.

    Attributes:
        modes: of requests in turn.
        sampling: of all, beside their length.
        arriving: a prompt comes in every so many steps, and leaves with its first token; 0: none.
    """

    modes: list[Any]
    sampling: dict[str, Any]
    arriving: int = 0


def _wishes() -> dict[str, _Wish]:
    from multiexit_engine import Contrast, Exit, Original, SelfSpeculative

    contrast = Contrast(LAYERS, EXIT)
    default = {"temperature": 0.8, "seed": 1}
    return {
        "original": _Wish([Original()], {}),
        "contrast": _Wish([contrast], {}),
        "mixed": _Wish([Original(), contrast, Exit(EXIT)], {}),
        "top_k 50": _Wish([Original()], default),
        "log-probabilities": _Wish([Original()], {"logprobs": 5}),
        "penalties": _Wish([Original()], {"repetition_penalty": 1.2}),
        "3 drafts": _Wish([SelfSpeculative(EXIT, 3)], {}),
        "prompts arrive": _Wish([Original()], {}, arriving=4),
    }


@contextmanager
def checkpoint() -> Iterator[Path]:
    """A GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, **SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
        yield Path(folder)


def new_engine(
    folder: Path, options: dict[str, Any], exits: tuple[int, ...] = (EXIT, LAYERS)
) -> Any:
    """An engine on the device, with the model's own head at some layers."""
    from multiexit_engine import Engine

    return Engine.from_pretrained(
        folder,
        device=DEVICE,
        dtype=sized("bfloat16", "float32"),
        backend=sized("native", "reference"),
        vocab_projection_mode="shared_projection_direct",
        lm_head_layer_indices=exits,
        max_batch_size=max(BATCHES),
        prefix_caching=False,
        **options,
    )


def _step(engine: Any, wish: _Wish, size: int) -> dict[str, float]:
    """Median and mean wall time of a step, tokens on the host included; NaN without a GPU.

    Where prompts arrive, the mean tells of the steps that the median passes over.
    """
    from multiexit_engine import SamplingParams

    num_steps = WARM_STEPS + TIMED_STEPS
    # drafts may all be right
    longest = min(num_steps * 4, SHAPE["n_positions"] - PROMPT_LEN)
    sampling = SamplingParams(max_new_tokens=longest, ignore_eos=True, **wish.sampling)
    arriving = SamplingParams(max_new_tokens=1)
    if wish.arriving:
        # a seat is kept for the prompt
        size = min(size, max(BATCHES) - 1)
    names = [
        engine.add_request([5 + i] * PROMPT_LEN, sampling, mode, streamed=False)
        for i, mode in zip(range(size), itertools.cycle(wish.modes), strict=False)
    ]
    times = []
    for number in range(num_steps):
        if wish.arriving and number % wish.arriving == 0:
            prompt = [(number + i) % SHAPE["vocab_size"] for i in range(PROMPT_LEN)]
            names.append(engine.add_request(prompt, arriving, streamed=False))
        start = time.perf_counter()
        engine.step_pieces()
        times.append(time.perf_counter() - start)
    for name in names:
        engine.abort(name)
    if DEVICE != "cuda":
        return {"step_us": float("nan"), "mean_us": float("nan")}
    timed = times[WARM_STEPS:]
    return {"step_us": statistics.median(timed) * 1e6, "mean_us": statistics.mean(timed) * 1e6}
