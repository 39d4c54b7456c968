"""Decode steps with early exits at forced rates: decided on the device, and by the host.

Weights are random, so whether a row leaves is simulated as in ``benchmarks/early_exits.py``: probes
are computed as always, then their answers are replaced.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from early_exits import simulate

from benchmarks.gpu import step_cases
from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.timing import COMPILES_ONLY, DEVICE, sized

# of the rows that come to an exit the share that leaves
RATES = sized((0.0, 0.6, 1.0), (0.5,))
BATCHES = sized((1, 16), (2,))
WARM_STEPS, TIMED_STEPS, COUNTED_STEPS = (
    sized((24, 64, 8), (2, 2, 1)) if not COMPILES_ONLY else (3, 1, 1)
)
NAN = float("nan")


def cases(_: Card) -> Iterator[Case]:
    """Microseconds of a step of GPT-2-medium's shape, exits at a quarter and at half its layers."""
    with step_cases.checkpoint() as folder:
        graphs = step_cases.WAYS["graphs"]
        ways = {"device": graphs, "host": graphs}
        if any(step_cases.CONDITIONAL.values()):
            ways["device, conditional nodes"] = graphs | step_cases.CONDITIONAL
        for way, options in ways.items():
            engine = Once(partial(_engine, folder, way, options))
            for name, mode, wishes in _wishes():
                for size in BATCHES:
                    label = {"decided by": way, "mode": name, "rows": size}
                    yield Case(label, partial(_line, engine, mode, size, wishes))
            engine.forget()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            if COMPILES_ONLY:
                return


def _engine(folder: Path, way: str, options: dict[str, Any]) -> Any:
    engine = step_cases.new_engine(folder, options, _exits())
    simulate(engine, _exits()[:-1])
    if way == "host":
        _leave_to_the_host(engine)
    return engine


def _line(engine: Once[Any], mode: Any, size: int, wishes: dict[str, Any]) -> dict[str, float]:
    try:
        return _step(engine(), mode, size, wishes)
    except Exception:
        engine.forget()  # its queues are in no known state
        raise


def _exits() -> tuple[int, ...]:
    last = step_cases.LAYERS
    return tuple(sorted({max(1, last // 4), last // 2, last}))


def _modes() -> dict[str, Any]:
    from multiexit_engine import EarlyExit, Original

    found: dict[str, Any] = {"original": Original()}
    for rate in RATES:
        for kv in ("recompute", "copy"):
            found[f"rate {rate}, {kv}"] = EarlyExit(1.0 - rate, "probe", kv=kv)
    return found | {"heads asked in vain": EarlyExit(2.0)}


def _wishes() -> list[tuple[str, Any, dict[str, Any]]]:
    """Modes, and what is wanted of distributions besides."""
    modes, rate = _modes(), RATES[len(RATES) // 2]
    name = f"rate {rate}, recompute"
    wishes = {
        "penalised": {"repetition_penalty": 1.2},
        "5 logprobs": {"logprobs": 5},
        "drawn": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    }
    return [(name, mode, {}) for name, mode in modes.items()] + [
        (f"{name}, {wish}", modes[name], each) for wish, each in wishes.items()
    ]


def _leave_to_the_host(engine: Any) -> None:
    """Let no step with early exits be launched as a whole."""
    steps = engine._core.runner._decode
    if steps is not None:
        steps._exit_steps.fits = lambda batch, *_: (
            not any(hasattr(item.sequence.request.decoding, "measure") for item in batch.scheduled)
        )


def _step(engine: Any, mode: Any, size: int, wishes: dict[str, Any]) -> dict[str, float]:
    """Median time of a step, how often the host waits in it, and the mean layer of its tokens."""
    from multiexit_engine import SamplingParams

    num_steps = WARM_STEPS + TIMED_STEPS + COUNTED_STEPS
    sampling = SamplingParams(max_new_tokens=num_steps + 1, ignore_eos=True, **wishes)
    names = [
        engine.add_request([5 + i] * step_cases.PROMPT_LEN, sampling, mode, streamed=False)
        for i in range(size)
    ]
    times = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        engine.step_pieces()
        times.append(time.perf_counter() - start)
    waits = sum(_waits_of_a_step(engine) for _ in range(COUNTED_STEPS)) / COUNTED_STEPS
    requests = [engine._core.requests[name] for name in names]
    layers = [layer for r in requests for layer in r.sequences[0].exit_layers]
    for name in names:
        engine.abort(name)
    if DEVICE != "cuda":
        return {"step_us": NAN, "waits": NAN, "mean_layer": NAN}
    return {
        "step_us": statistics.median(times[WARM_STEPS:]) * 1e6,
        "waits": waits,
        "mean_layer": statistics.mean(layers),
    }


def _waits_of_a_step(engine: Any) -> int:
    """The one at its end, and those that PyTorch warns of."""
    if DEVICE != "cuda":
        engine.step_pieces()
        return 0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.step_pieces()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 1 + sum("synchroniz" in str(each.message) for each in found)
