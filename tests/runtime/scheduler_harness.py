"""A runner and an engine for scheduler tests: it remembers what every KV slot would hold."""

from __future__ import annotations

import random
from collections import Counter

import torch

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence
from multiexit_engine.config import EngineConfig
from multiexit_engine.outputs import FinishReason
from multiexit_engine.params import Original, SamplingParams
from multiexit_engine.request import Request, ScoredToken, Sequence
from multiexit_engine.runtime.scheduling.scheduler import Scheduler


def make_config(**changes) -> EngineConfig:
    values = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "backend": "reference",
        "max_model_len": 64,
        "max_batch_size": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "num_kv_blocks": 64,
        "prefix_caching": True,
        "seed": 0,
    }
    return EngineConfig(**{**values, **changes})


def make_request(name="a", prompt=(1, 2, 3, 4, 5), depth=12, score_from=None, **sampling):
    params = SamplingParams(**{"max_new_tokens": 4, **sampling})
    request = Request(name, list(prompt), params, Original(), depth, 0, score_from=score_from)
    request.sequences = [Sequence(request, 0, list(prompt))]
    return request


def fingerprints(token_ids: list[int]) -> list[int]:
    """For each token a value that depends on it and on all before it, as keys and values do."""
    values, value = [], 0
    for token in token_ids:
        value = hash((value, token))
        values.append(value)
    return values


class FakeEngine:
    """Runs a scheduler as the engine does, and checks each step's reads and writes."""

    def __init__(self, config: EngineConfig, seed: int = 0, stop_chance: float = 0.0) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.requests: dict[str, Request] = {}
        self.slots: list[tuple[int, int] | None] = [None] * (
            config.num_kv_blocks * config.block_size
        )
        self.random = random.Random(seed)
        self.stop_chance = stop_chance
        self.batches: list[ScheduledBatch] = []

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        return request

    def abort(self, request_id: str) -> None:
        assert self.scheduler.abort(request_id) is self.requests.pop(request_id)

    def step(self, abort_before_advance: str | None = None) -> ScheduledBatch | None:
        self._check_that_only_the_youngest_prompt_is_cut()
        oldest = self._oldest_running()
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if batch is None:
            return None
        self.batches.append(batch)
        self._check_plan(batch, oldest)
        self._run(batch)
        if abort_before_advance is not None:
            self.abort(abort_before_advance)
        self.scheduler.advance(batch)
        self._update([c for c in batch.scheduled if not c.sequence.is_finished])
        self.scheduler.check_integrity()
        return batch

    def run_to_the_end(self) -> int:
        """Steps until nothing lives; fails when that takes longer than one by one would."""
        longest = self.config.max_model_len * self.config.max_batch_size
        limit = longest * (len(self.requests) + 1) * self.config.max_batch_size
        for steps in range(limit):
            if not self.scheduler.has_unfinished:
                return steps
            assert self.step() is not None, "requests live, but nothing runs"
        raise AssertionError(f"still unfinished after {limit} steps")

    def live_sequences(self) -> list[Sequence]:
        sequences = [s for r in self.requests.values() for s in r.sequences]
        return [s for s in sequences if not s.is_finished]

    def _oldest_running(self) -> Request | None:
        live = [s.request for s in self.live_sequences() if s.block_table]
        is_crowded = len(live) > self.config.max_num_batched_tokens
        return live[0] if live and not is_crowded else None

    def _check_that_only_the_youngest_prompt_is_cut(self) -> None:
        for unit in self.scheduler._queues.running[:-1]:
            assert sum(count for _, count in unit.pending()) == len(unit.sequences)

    def _check_plan(self, batch: ScheduledBatch, oldest: Request | None) -> None:
        assert 0 < batch.num_tokens <= self.config.max_num_batched_tokens
        depths = [c.sequence.request.depth for c in batch.scheduled]
        assert depths == sorted(depths, reverse=True)
        assert len({c.sequence for c in batch.scheduled}) == len(batch.scheduled)
        if oldest is not None:
            assert any(c.sequence.request is oldest for c in batch.scheduled)
        for chunk in batch.scheduled:
            assert chunk.start == chunk.sequence.num_computed_tokens
            assert chunk.start < chunk.stop <= chunk.sequence.num_tokens
            assert len(chunk.sequence.block_table) * self.config.block_size >= chunk.stop

    def _run(self, batch: ScheduledBatch) -> None:
        self._copy(batch.block_copies)
        owners = Counter(b for s in self.live_sequences() for b in s.block_table)
        written = set()
        for chunk in batch.scheduled:
            marks = fingerprints(chunk.sequence.token_ids)
            for position in range(chunk.start, chunk.stop):
                slot = self._slot(chunk.sequence, position)
                assert owners[slot // self.config.block_size] == 1, "a shared block is written"
                assert slot not in written, "a slot is written twice"
                written.add(slot)
                self.slots[slot] = (marks[position], chunk.sequence.request.depth)
        for chunk in batch.scheduled:
            self._check_reads(chunk)
            self._score(chunk)

    def _copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy one by one; fails unless copying all at once would give the same."""
        size = self.config.block_size
        before = list(self.slots)
        assert len({target for _, target in copies}) == len(copies)
        for source, target in copies:
            contents = self.slots[source * size : (source + 1) * size]
            assert contents == before[source * size : (source + 1) * size]
            self.slots[target * size : (target + 1) * size] = contents

    def _check_reads(self, chunk: ScheduledSequence) -> None:
        marks = fingerprints(chunk.sequence.token_ids)
        for position in range(chunk.stop):
            held = self.slots[self._slot(chunk.sequence, position)]
            assert held is not None and held[0] == marks[position], f"position {position}: {held}"
            assert held[1] >= chunk.sequence.request.depth, "too few layers"

    def _score(self, chunk: ScheduledSequence) -> None:
        """Take log-probabilities of prompt tokens as they come; none may be left out."""
        request = chunk.sequence.request
        first = request.first_position_with_logprobs
        if first is None:
            return
        wanted = first + len(request.scored)
        if wanted < len(request.prompt_token_ids):
            assert chunk.start <= wanted - 1, f"position {wanted} cannot be scored any more"
        for position in range(wanted, min(chunk.stop + 1, len(request.prompt_token_ids))):
            request.scored.append(ScoredToken(request.prompt_token_ids[position], 0.0, 1, True))

    def _slot(self, sequence: Sequence, position: int) -> int:
        size = self.config.block_size
        return sequence.block_table[position // size] * size + position % size

    def _update(self, chunks: list[ScheduledSequence]) -> None:
        beams: dict[Request, list[Sequence]] = {}
        for chunk in chunks:
            sequence, request = chunk.sequence, chunk.sequence.request
            if not chunk.reaches_end or sequence.is_finished:
                continue
            if request.score_from is not None:
                self.scheduler.finish(sequence, FinishReason.STOP)
            elif request.is_beam_search:
                beams.setdefault(request, []).append(sequence)
            else:
                self._append(sequence)
        for request, sequences in beams.items():
            self._advance_beams(request, sequences)
        for request_id in [i for i, r in self.requests.items() if r.is_finished]:
            del self.requests[request_id]

    def _append(self, sequence: Sequence) -> None:
        request = sequence.request
        siblings = [sequence]
        if not sequence.num_output_tokens:
            siblings += [self.scheduler.fork(sequence, i) for i in range(1, request.width)]
            request.sequences = siblings
        for sibling in siblings:
            sibling.token_ids.append(self.random.randrange(2))
            if self._is_long_enough(sibling):
                self.scheduler.finish(sibling, FinishReason.LENGTH)

    def _advance_beams(self, request: Request, sequences: list[Sequence]) -> None:
        assert sequences == request.sequences, "beams move in lockstep, in their order"
        parents = [self.random.choice(sequences) for _ in range(request.width)]
        beams = []
        for index, parent in enumerate(parents):
            child = self.scheduler.fork(parent, index) if parent in beams else parent
            child.index = index
            beams.append(child)
        for beam in beams:
            beam.token_ids.append(self.random.randrange(2))
        request.sequences = beams
        self.scheduler.replace(request, beams)
        if any(self._is_long_enough(beam) for beam in beams):
            for beam in beams:
                self.scheduler.finish(beam, FinishReason.LENGTH)

    def _is_long_enough(self, sequence: Sequence) -> bool:
        return (
            sequence.num_output_tokens >= sequence.request.sampling.max_new_tokens
            or sequence.num_tokens >= self.config.max_model_len
            or self.random.random() < self.stop_chance
        )
