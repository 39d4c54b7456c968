"""Whole models beside transformers on the same weights: time of a token alone, and of many at once.

Every way runs in turn; a token's time is the mean gap between tokens of one request, so prompts do
not count. Weights are random, of the sizes that people know.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bars import Bar
from bytes_read import mean_context, step_bytes, weights_of_step
from checkpoints import SHAPES, Shape, make_checkpoint
from peers import generate, load_ibm_way, load_transformers
from report import alternate, median

from benchmarks.gpu.timing import DEVICE, sized

NAMES = sized(("gpt2-medium", "gpt-neo-125m", "llama-8b"), ("tiny", "tiny-llama"))
PROMPT_LEN, NEW_TOKENS, ROUNDS = sized((128, 64, 5), (8, 4, 1))
MANY = sized(256, 4)
KV_BYTES = sized(8 << 30, 32 << 20)
# off a GPU the options are refused, and no time is given anyway
FAST = sized({"cuda_graphs": True, "async_scheduling": True}, {})
SPARE_BYTES = 40 << 30
Turn = Callable[[], float]


def measure(read_tb_s: float, gemm_tflop_s: float) -> dict[str, Any]:
    """Rows of microseconds and floors, and the project's bars, for every model that fits."""
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for name in NAMES:
        with _folder() as folder:
            shape = SHAPES[name]
            checkpoint = make_checkpoint(shape, folder, torch.bfloat16, DEVICE)
            found, many_us = _times(shape, checkpoint)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        for way, us in found.items():
            row = {"model": name, "way": way, "rows": 1, "token_us": us}
            rows.append(row | {"floor_us": _floor_us(shape, way, read_tb_s)})
        floor = _floor_of_many_us(shape, read_tb_s, gemm_tflop_s)
        rows.append({
            "model": name, "way": "engine, three modes", "rows": MANY,
            "token_us": many_us, "floor_us": floor,
        })  # fmt: skip
        bars += _bars(name, found)
    return {"rows": rows, "bars": [bar.as_row() for bar in bars]}


def _times(shape: Shape, checkpoint: Path) -> tuple[dict[str, float], float]:
    """Microseconds of a token of one request by way, and of a step of many requests."""
    engine = _engine(shape, checkpoint)
    turns = _engine_turns(engine, shape) | _peer_turns(shape, checkpoint)
    seconds = alternate(turns, ROUNDS)
    many = alternate({"many": lambda: _step_of_many_s(engine, shape)}, ROUNDS)["many"]
    return {way: 1e6 * median(values) for way, values in seconds.items()}, 1e6 * median(many)


def _engine(shape: Shape, checkpoint: Path) -> Any:
    from multiexit_engine import Engine

    return Engine.from_pretrained(
        checkpoint,
        device=DEVICE,
        dtype=sized("bfloat16", "float32"),
        backend=sized("native", "reference"),
        lm_head_layer_indices=[shape.lower, shape.upper],
        vocab_projection_mode="shared_projection_direct" if shape.shares_head else None,
        max_batch_size=MANY,
        max_model_len=PROMPT_LEN + NEW_TOKENS,
        kv_cache_memory=KV_BYTES,
        prefix_caching=False,
        **FAST,
    )


def _modes(shape: Shape) -> dict[str, Any]:
    from multiexit_engine import Contrast, Exit, Original

    return {
        "Original": Original(),
        "Contrast": Contrast(shape.upper, shape.lower),
        "Exit": Exit(shape.lower),
    }


def _prompt(shape: Shape) -> list[int]:
    return [(7 * place) % shape.config.vocab_size for place in range(PROMPT_LEN)]


def _engine_turns(engine: Any, shape: Shape) -> dict[str, Turn]:
    from multiexit_engine import SamplingParams

    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)

    def turn(mode: Any) -> float:
        times: list[float] = []
        for chunk in engine.stream(_prompt(shape), sampling, mode):
            times += [time.perf_counter()] * len(chunk.token_ids)
        return _mean_gap(times)

    modes = _modes(shape).items()
    return {f"engine {name}": lambda mode=mode: turn(mode) for name, mode in modes}


class _Clock:
    """A streamer of transformers that only looks at the clock."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        ids.cpu()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def _peer_turns(shape: Shape, checkpoint: Path) -> dict[str, Turn]:
    dtype = sized(torch.bfloat16, torch.float32)
    plain = load_transformers(shape, checkpoint, dtype, DEVICE)
    # a cache of fixed size makes generate() compile the model, on devices where that pays
    ways: dict[str, tuple[Any, dict[str, object]]] = {
        "transformers eager": (plain, {"disable_compile": True}),
        "transformers compiled": (plain, {"cache_implementation": "static"}),
    }
    if not shape.shares_head:
        ibm = load_ibm_way(shape, checkpoint, dtype, shape.exits, DEVICE)
        ways["IBM's way"] = ibm, {"disable_compile": True}

    def turn(model: Any, options: dict[str, object]) -> float:
        clock = _Clock()
        generate(model, [_prompt(shape)], NEW_TOKENS, streamer=clock, **options)
        return _mean_gap(clock.times[1:])  # the first are the prompt's own

    return {name: lambda way=way: turn(*way) for name, way in ways.items()}


def _mean_gap(times: list[float]) -> float:
    gap = (times[-1] - times[0]) / (len(times) - 1)
    return gap if DEVICE == "cuda" else float("nan")


def _step_of_many_s(engine: Any, shape: Shape) -> float:
    """Seconds of a decode step of requests in three modes, prompts left out."""
    from multiexit_engine import SamplingParams

    modes = list(_modes(shape).values())
    chosen = [modes[index % len(modes)] for index in range(MANY)]
    seconds = []
    for new_tokens in (1, NEW_TOKENS):
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        engine.generate([_prompt(shape)] * MANY, sampling, chosen, progress=False)
        seconds.append(time.perf_counter() - start)
    step = (seconds[1] - seconds[0]) / (NEW_TOKENS - 1)
    return step if DEVICE == "cuda" else float("nan")


def _floor_us(shape: Shape, way: str, read_tb_s: float) -> float:
    """Microseconds in which a token's bytes can be read; IBM's way reads every head."""
    layers = shape.lower if way == "engine Exit" else shape.upper
    num_bytes = step_bytes(shape, layers, "bfloat16", mean_context(PROMPT_LEN, NEW_TOKENS))
    if way == "IBM's way":
        num_bytes += 2 * (len(shape.exits) - 1) * shape.config.vocab_size * shape.config.hidden_size
    return num_bytes / read_tb_s / 1e6


def _floor_of_many_us(shape: Shape, read_tb_s: float, gemm_tflop_s: float) -> float:
    """The roofline of a step of many: its bytes, or its multiplications if they take longer."""
    context = mean_context(PROMPT_LEN, NEW_TOKENS)
    head = shape.config.vocab_size * shape.config.hidden_size
    num_bytes = 2.0 * weights_of_step(shape, shape.upper)
    num_bytes += 0 if shape.shares_head else 2 * head
    num_flops = 0.0
    for index in range(MANY):
        layers = shape.lower if index % 3 == 2 else shape.upper
        num_bytes += step_bytes(shape, layers, "bfloat16", context)
        num_bytes -= step_bytes(shape, layers, "bfloat16", 0)
        num_flops += 2 * weights_of_step(shape, layers)
    return max(num_bytes / read_tb_s, num_flops / gemm_tflop_s) / 1e6


def _bars(name: str, found: dict[str, float]) -> list[Bar]:
    """A token's time, what a contrast costs, and the peers."""
    original, contrast = found["engine Original"], found["engine Contrast"]
    bars = [Bar(f"{name}: Contrast / Original", 1.03, contrast / original, at_most=True)]
    compiled = found["transformers compiled"]
    bars.append(Bar(f"{name}: transformers compiled / Original", 1.3, compiled / original))
    if "IBM's way" in found:
        bars.append(Bar(f"{name}: IBM's way / Contrast", 20, found["IBM's way"] / contrast))
    if name == "gpt2-medium":
        for wanted in (400, 220):
            bars.append(Bar(f"{name}: microseconds of a token", wanted, original, at_most=True))
    return bars


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory where there is room, since checkpoints are written to be read once."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > SPARE_BYTES
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as folder:
        yield Path(folder)
