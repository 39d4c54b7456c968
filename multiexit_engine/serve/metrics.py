"""Prometheus metrics of one server: vLLM's names where the meaning is the same, and our own.

Knows pieces and counts; nothing of HTTP.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from multiexit_engine.config import ModelConfig
from multiexit_engine.outputs import CANDIDATE_BOUNDS, EngineStats, RequestPiece

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
LONG_S = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Tally:
    """A histogram that one thread counts: a fraction of what prometheus-client's own takes.

    Args:
        bounds: upper ends of its buckets, ascending; what is larger counts, too.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(slots=True)
class _Timeline:
    """When things happened to a living request, in seconds of ``perf_counter``."""

    arrived: float
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0


class Metrics:
    """Watches an ``AsyncEngine``; every instance has a registry of its own.

    Args:
        stats: gives the engine's present counts.
        model: its shape.
        model_name: label of all metrics.
    """

    def __init__(
        self, stats: Callable[[], EngineStats], model: ModelConfig, model_name: str
    ) -> None:
        self.registry = CollectorRegistry()
        layers = sorted({*model.exit_layers, model.num_layers})
        self._gaps = Tally(SHORT_S)
        self.registry.register(_StatsCollector(stats, model_name, layers, self._gaps))
        self._model_name = model_name
        self._timelines: dict[str, _Timeline] = {}
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens computed.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", LONG_S
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", LONG_S
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", LONG_S
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From the first step to the first token.", LONG_S
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", LONG_S
        )
        self._prompt_length = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS
        )
        self._output_length = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", TOKENS
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def arrived(self, request_id: str, now: float) -> None:
        self._timelines[request_id] = _Timeline(now)

    def left(self, request_id: str) -> None:
        if self._timelines.pop(request_id, None) is not None:
            self._finished.labels(self._model_name, "abort").inc()

    def stepped(self, pieces: Sequence[RequestPiece], now: float) -> None:
        num_new = 0
        for piece in pieces:
            timeline = self._timelines[piece.request_id]
            num_new += self._note_tokens(timeline, piece, now)
            if piece.finished:
                self._note_end(self._timelines.pop(piece.request_id), piece, now)
        self._generated.inc(num_new)

    def _note_tokens(self, timeline: _Timeline, piece: RequestPiece, now: float) -> int:
        """The number of tokens that a piece brought."""
        counts = [len(output.token_ids) for output in piece.outputs]
        num_new = sum(counts)
        if not num_new:
            return 0
        timeline.num_tokens += num_new
        if timeline.first_token is None:
            timeline.first_token = now
            self._first_token.observe(now - timeline.arrived)
            self._prompt_tokens.inc(len(piece.prompt_token_ids))
            if piece.admitted_at is not None:
                self._queue.observe(piece.admitted_at - timeline.arrived)
                self._prefill.observe(now - piece.admitted_at)
        else:
            # tokens that come together share the time since the last ones
            for count in filter(None, counts):
                self._gaps.add((now - timeline.last_token) / count, count)
        timeline.last_token = now
        return num_new

    def _note_end(self, timeline: _Timeline, piece: RequestPiece, now: float) -> None:
        reasons = [str(output.finish_reason) for output in piece.outputs]
        reason = "error" if piece.error is not None else reasons[-1] if reasons else "stop"
        self._finished.labels(self._model_name, reason).inc()
        self._whole.observe(now - timeline.arrived)
        self._prompt_length.observe(len(piece.prompt_token_ids))
        self._output_length.observe(timeline.num_tokens)
        if timeline.first_token is not None:
            self._decode.observe(now - timeline.first_token)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, ["model_name"], registry=self.registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self._model_name)


class _StatsCollector(Collector):
    """The engine's counts and the gaps between tokens, looked up when somebody asks."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        model_name: str,
        layers: Sequence[int],
        gaps: Tally,
    ) -> None:
        self._stats = stats
        self._model_name = model_name
        self._layers = layers
        self._gaps = gaps

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        used = stats.num_kv_blocks - stats.num_free_kv_blocks
        gauges = {
            "vllm:num_requests_running": ("Sequences that hold KV blocks.", stats.num_running),
            "vllm:num_requests_waiting": ("Requests that wait for a turn.", stats.num_waiting),
            "vllm:kv_cache_usage_perc": (
                "Share of the KV blocks that sequences hold; 1 is all.",
                used / stats.num_kv_blocks,
            ),
        }
        counters = {
            "vllm:num_preemptions": ("Sequences computed again.", stats.num_preemptions),
            "vllm:prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_query_tokens,
            ),
            "vllm:prefix_cache_hits": ("Prompt tokens found there.", stats.prefix_hit_tokens),
            "vllm:spec_decode_num_draft_tokens": (
                "Drafts of self-speculation that were checked.",
                stats.num_drafted_tokens,
            ),
            "vllm:spec_decode_num_accepted_tokens": (
                "Drafts that were right.",
                stats.num_accepted_tokens,
            ),
            "multiexit:engine_steps": ("Steps of the engine.", stats.num_steps),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        yield self._histogram(
            "vllm:inter_token_latency_seconds", "From one token to the next.", self._gaps
        )
        exits = Tally(self._layers)
        for layer, count in stats.num_tokens_by_layer.items():
            exits.add(layer, count)
        yield self._histogram("multiexit:exit_layer", "Layer whose head chose a token.", exits)
        yield self._histogram(
            "multiexit:contrast_candidates",
            "Tokens that a contrast found plausible, each time it chose one.",
            _candidates(stats),
        )

    def _histogram(self, name: str, text: str, tally: Tally) -> HistogramMetricFamily:
        histogram = HistogramMetricFamily(name, text, labels=["model_name"])
        bounds = [*(f"{float(bound)}" for bound in tally.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(tally.counts), strict=True))
        histogram.add_metric([self._model_name], buckets, sum_value=tally.total)
        return histogram


def _candidates(stats: EngineStats) -> Tally:
    tally = Tally(CANDIDATE_BOUNDS[:-1])
    tally.counts = [*stats.contrasts_by_candidates] or tally.counts
    tally.total = stats.num_candidates
    return tally
