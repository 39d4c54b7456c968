"""Whole models beside transformers on the same weights: time of a token alone, and of many at once.

Every way runs in turn; a token's time is the mean gap between tokens of one request, so prompts do
not count. Weights are random, of the sizes that people know.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bars import Bar
from bytes_read import mean_context, step_bytes, weights_of_step
from checkpoints import SHAPES, Shape, make_checkpoint
from peers import generate, load_ibm_way, load_transformers
from report import alternate, median

from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.part import shortened
from benchmarks.gpu.timing import DEVICE, sized
from multiexit_engine._cuda.library import PATH

# off a GPU, what is rehearsed in their place
TINY = {"gpt2-medium": "tiny", "gpt-neo-125m": "tiny", "llama-8b": "tiny-llama"}
PROMPT_LEN, NEW_TOKENS, ROUNDS = sized((128, 64, 3), (8, 4, 1))
MANY = sized(256, 4)
KV_BYTES = sized(8 << 30, 32 << 20)
# off a GPU the options are refused, and no time is given anyway
FAST = sized({"cuda_graphs": True, "async_scheduling": True}, {})
# all layers of a few rows are one launch; where the CUDA kernels are built
PERSISTENT = sized({"persistent_blocks": True}, {})
SPARE_BYTES = 40 << 30
NAN = float("nan")
Turn = Callable[[], float]


def cases(card: Card, of: str) -> Iterator[Case]:
    """Microseconds and floors of one model: the engine's modes, its many requests, its peers."""
    shape = SHAPES[sized(of, TINY[of])]
    with _folder() as folder:
        checkpoint = Once(lambda: make_checkpoint(shape, folder, torch.bfloat16, DEVICE))
        engine = Once(lambda: _engine(shape, checkpoint()))
        alone, many, beside = (
            {"model": of, "in turn": turns} for turns in ("its modes", "nobody", "its peers")
        )
        yield Case(alone, lambda: _lines(shape, _engine_turns(engine(), shape), card))
        yield Case(many, lambda: _line_of_many(shape, engine(), card))
        yield Case(beside, lambda: _beside(shape, engine(), checkpoint(), card))
        engine.forget()
        if sized(PATH.exists(), True):
            staying = Once(lambda: _engine(shape, checkpoint(), PERSISTENT))
            label = {"model": of, "in turn": "its modes, layers in one launch"}
            yield Case(label, lambda: _lines(shape, _engine_turns(staying(), shape), card))


def _lines(shape: Shape, turns: dict[str, Turn], card: Card) -> list[dict[str, Any]]:
    """One line for each way, its failure too: a peer may not run on this machine."""
    failed: dict[str, str] = {}

    def safe(way: str) -> float:
        if way in failed:
            return NAN
        try:
            return turns[way]()
        except Exception as error:
            failed[way] = shortened(error)
            return NAN

    seconds = alternate({way: partial(safe, way) for way in turns}, ROUNDS)
    lines: list[dict[str, Any]] = []
    for way, values in seconds.items():
        line = {"way": way, "rows": 1, "token_us": 1e6 * median(values)}
        line["floor_us"] = _floor_us(shape, way, card.read_tb_s)
        lines.append(line | ({"error": failed[way]} if way in failed else {}))
    return lines


def _beside(shape: Shape, engine: Any, checkpoint: Path, card: Card) -> list[dict[str, Any]]:
    """All ways in turn, and the project's bars."""
    turns = _engine_turns(engine, shape) | _peer_turns(shape, checkpoint)
    lines = _lines(shape, turns, card)
    found = {line["way"]: line["token_us"] for line in lines}
    return lines + [bar.as_row() for bar in _bars(shape.name, found)]


def _line_of_many(shape: Shape, engine: Any, card: Card) -> dict[str, Any]:
    many = alternate({"many": lambda: _step_of_many_s(engine, shape)}, ROUNDS)["many"]
    floor = _floor_of_many_us(shape, card.read_tb_s, card.gemm_tflop_s)
    way = {"way": "engine, three modes", "rows": MANY}
    return way | {"token_us": 1e6 * median(many), "floor_us": floor}


def _engine(shape: Shape, checkpoint: Path, options: dict[str, Any] | None = None) -> Any:
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
        **(options or {}),
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
    plain = Once(lambda: load_transformers(shape, checkpoint, dtype, DEVICE))
    # a cache of fixed size makes generate() compile the model, on devices where that pays
    ways: dict[str, tuple[Once[Any], dict[str, object]]] = {
        "transformers eager": (plain, {"disable_compile": True}),
        "transformers compiled": (plain, {"cache_implementation": "static"}),
    }
    if not shape.shares_head:
        ibm = Once(lambda: load_ibm_way(shape, checkpoint, dtype, shape.exits, DEVICE))
        ways["IBM's way"] = ibm, {"disable_compile": True}

    def turn(model: Once[Any], options: dict[str, object]) -> float:
        clock = _Clock()
        generate(model(), [_prompt(shape)], NEW_TOKENS, streamer=clock, **options)
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
    if found.get("IBM's way"):
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
