"""What early exits gain and lose: a sweep of thresholds on one engine.

Quality is measured on a given text, speed on continuations of it, beside full depth in the same
run. Knows the engine's face; nothing of plots.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multiexit_engine.engine import Engine
from multiexit_engine.evaluate.calibration import agreements
from multiexit_engine.modes import DecodingMode, EarlyExit, Measure, Original
from multiexit_engine.params import SamplingParams

WINDOW = 128
DEFAULT_THRESHOLDS: dict[Measure, tuple[float, ...]] = {
    "max_prob": (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0),
    "margin": (0.95, 0.9, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0),
    "entropy": (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 20.0),
    "similarity": (0.999, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, -1.0),
    "patience": (4.0, 3.0, 2.0),
    "probe": (0.95, 0.92, 0.9, 0.88, 0.85, 0.82, 0.8, 0.75, 0.7, 0.0),
}


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One threshold.

    Attributes:
        threshold: of the mode.
        agreement: share of the text's positions where the exit that is taken has the best token of
            the model's own head.
        perplexity: per token of the text, each position at its own exit.
        mean_layer: at which generated tokens left.
        shares: of the generated tokens by layer.
        tokens_per_second: new tokens, prompts included in the time; median of the runs.
        speedup: of that over full depth in the same run.
    """

    threshold: float
    agreement: float
    perplexity: float
    mean_layer: float
    shares: dict[int, float]
    tokens_per_second: float
    speedup: float


def measure_frontier(
    engine: Engine,
    text: str,
    *,
    measure: Measure = "max_prob",
    thresholds: tuple[float, ...] | None = None,
    layers: tuple[int, ...] | None = None,
    shortlist: int | None = None,
    batch_size: int = 1,
    num_prompts: int = 8,
    prompt_len: int = 32,
    max_new_tokens: int = 64,
    num_runs: int = 3,
    num_windows: int = 64,
) -> list[FrontierPoint]:
    """One point for each threshold, from the strictest on.

    Args:
        engine: with a tokenizer; holds no requests.
        text: new to the model.
        measure: of the mode, like ``layers`` and ``shortlist``.
        thresholds: to be measured; None for a spread of them.
        layers: the exits that may be taken; None for all below the last layer.
        shortlist: as in the mode.
        batch_size: requests at once.
        num_prompts: prompts that are continued, greedily, from the beginnings of windows.
        prompt_len: tokens of each prompt.
        max_new_tokens: tokens that each request generates; ending tokens are ignored.
        num_runs: timed runs, after one that is not.
        num_windows: windows of 128 tokens of the text on which quality is measured.

    Raises:
        ValueError: the text has no window of 128 tokens, or the mode does not fit the model.
    """
    if engine.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: early exits are measured on a text")
    ids = list(engine.tokenizer(text)["input_ids"])
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if not windows:
        raise ValueError(f"the text holds no window of {WINDOW} tokens: give a longer one")
    prompts = [window[:prompt_len] for window in windows[:num_prompts]]
    windows = windows[:num_windows]
    modes = [
        EarlyExit(threshold, measure, layers, shortlist=shortlist)
        for threshold in thresholds or DEFAULT_THRESHOLDS[measure]
    ]
    readings = [
        engine.exit_readings(window, modes[0])._replace(states=torch.empty(0)) for window in windows
    ]
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, confidences=False)
    speeds, tokens_by_layer = _speeds(
        engine, [Original(), *modes], prompts, params, batch_size, num_runs
    )
    points = []
    for mode, speed, counts in zip(modes, speeds[1:], tokens_by_layer[1:], strict=True):
        assert mode.threshold is not None, "each mode was given one"
        kept = torch.cat([agreements(r, measure, mode.threshold)[:-1] for r in readings])
        total = sum(counts.values())
        points.append(
            FrontierPoint(
                threshold=mode.threshold,
                agreement=float(kept.double().mean()),
                perplexity=_perplexity(engine, windows, mode),
                mean_layer=sum(layer * count for layer, count in counts.items()) / total,
                shares={layer: count / total for layer, count in sorted(counts.items())},
                tokens_per_second=speed,
                speedup=speed / speeds[0],
            )
        )
    return points


def _speeds(
    engine: Engine,
    modes: Sequence[DecodingMode],
    prompts: Sequence[list[int]],
    params: SamplingParams,
    batch_size: int,
    num_runs: int,
) -> tuple[list[float], list[Counter[int]]]:
    """Tokens per second of each mode, and its tokens by layer; modes take turns in every run."""
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    num_tokens = len(prompts) * params.max_new_tokens
    seconds: list[list[float]] = [[] for _ in modes]
    layers: list[Counter[int]] = [Counter() for _ in modes]
    for _ in range(num_runs + 1):
        for place, mode in enumerate(modes):
            start = time.perf_counter()
            outputs = [engine.generate(batch, params, mode, progress=False) for batch in batches]
            seconds[place].append(time.perf_counter() - start)
            layers[place] = Counter(
                layer for batch in outputs for o in batch for layer in o.outputs[0].exit_layers
            )
    return [num_tokens / statistics.median(times[1:]) for times in seconds], layers


def _perplexity(engine: Engine, windows: Sequence[list[int]], mode: DecodingMode) -> float:
    scores = engine.score(list(windows), mode, progress=False)
    count = sum(len(window) - 1 for window in windows)
    return math.exp(-sum(score.total for score in scores) / count)
