"""How fast an engine runs a decoding mode: latency of one request, throughput of many.

Knows one engine; comparisons with other programs are scripts of their own under benchmarks/.
Prompts are random tokens, new ones for every run, so that no prefix is found in the cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from multiexit_engine.engine import Engine
from multiexit_engine.params import DecodingMode, SamplingParams


@dataclass(frozen=True, slots=True)
class Latency:
    """One request alone; medians over the runs.

    Attributes:
        first_token_ms: from the call to the first token.
        token_ms: between later tokens.
    """

    first_token_ms: float
    token_ms: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 / self.token_ms


@dataclass(frozen=True, slots=True)
class Throughput:
    """Requests of equal shape at once; the median run.

    Attributes:
        batch_size: requests of a run.
        seconds: of the run, prompts included.
        tokens_per_second: new tokens of all requests by ``seconds``.
    """

    batch_size: int
    seconds: float
    tokens_per_second: float


def measure_latency(
    engine: Engine,
    decoding: DecodingMode | None = None,
    *,
    prompt_len: int = 32,
    max_new_tokens: int = 64,
    num_runs: int = 3,
    seed: int = 0,
) -> Latency:
    """Times of single requests after one run that is not counted.

    Args:
        engine: the engine to measure.
        decoding: its mode; None for the engine's own.
        prompt_len: tokens of each prompt.
        max_new_tokens: tokens that each request generates; ending tokens are ignored.
        num_runs: runs of which the median is taken.
        seed: of the random prompts.
    """
    prompts = _prompts(engine, prompt_len, seed)
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, confidences=False)
    runs = [_token_times(engine, next(prompts), params, decoding) for _ in range(num_runs + 1)][1:]
    if len(runs[0]) < 2:
        raise ValueError(f"max_new_tokens={max_new_tokens}: a latency needs at least two tokens")
    return Latency(
        first_token_ms=1000 * statistics.median(times[0] for times in runs),
        token_ms=1000 * statistics.median(_mean_gap(times) for times in runs),
    )


def measure_throughput(
    engine: Engine,
    decoding: DecodingMode | None = None,
    *,
    batch_size: int = 8,
    prompt_len: int = 32,
    max_new_tokens: int = 64,
    num_runs: int = 3,
    seed: int = 0,
) -> Throughput:
    """Tokens per second of a batch after one run that is not counted.

    Args:
        engine: the engine to measure.
        decoding: its mode; None for the engine's own.
        batch_size: requests at once.
        prompt_len: tokens of each prompt.
        max_new_tokens: tokens that each request generates; ending tokens are ignored.
        num_runs: runs of which the median is taken.
        seed: of the random prompts.
    """
    prompts = _prompts(engine, prompt_len, seed)
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, confidences=False)
    seconds, num_tokens = [], 0
    for _ in range(num_runs + 1):
        batch = [next(prompts) for _ in range(batch_size)]
        start = time.perf_counter()
        outputs = engine.generate(batch, params, decoding, progress=False)
        seconds.append(time.perf_counter() - start)
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    median = statistics.median(seconds[1:])
    return Throughput(batch_size, median, num_tokens / median)


def _prompts(engine: Engine, length: int, seed: int) -> Iterator[list[int]]:
    numbers = random.Random(seed)
    while True:
        yield [numbers.randrange(engine.model_config.vocab_size) for _ in range(length)]


def _token_times(
    engine: Engine, prompt: list[int], params: SamplingParams, decoding: DecodingMode | None
) -> list[float]:
    """Seconds from the call to each token."""
    start, times = time.perf_counter(), []
    for chunk in engine.stream(prompt, params, decoding):
        times += [time.perf_counter() - start] * len(chunk.token_ids)
    return times


def _mean_gap(times: list[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1)
