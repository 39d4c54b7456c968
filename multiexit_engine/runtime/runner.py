"""Runs one scheduled step: layers in segments, heads at the taps, tokens out.

The one place that joins models and decoding, and the one place that waits for the device. Knows
nothing of queues, blocks' owners or texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.batch import (
    BeamCandidates,
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    StepOutput,
)
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.beam import beam_candidates
from multiexit_engine.decoding.exits import Draws, gives_tokens, mode_scores, mode_tokens
from multiexit_engine.decoding.plan import ExitPlan, ExitPlanner, plan_segments
from multiexit_engine.decoding.sampler import (
    TokenRow,
    choose_tokens,
    needs_scores,
    token_logprobs,
)
from multiexit_engine.errors import RequestFailed
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.params import DecodingMode
from multiexit_engine.request import ChosenToken, Request, ScoredToken
from multiexit_engine.request import Sequence as TokenSequence

NOT_A_NUMBER = "its mode gave NaN as the score of a token"
NO_TOKEN_LEFT = "its mode and its parameters together leave no token to choose"
MAX_LOGIT_ROWS = 256  # rows of a float32 [rows, vocab] tensor made at once: 51 MB at GPT-2's vocab


@dataclass(frozen=True, slots=True)
class _LogitRow:
    """A flat row of the batch whose hidden state becomes a distribution."""

    flat_row: int
    item: ScheduledSequence
    target: int | None = None


@dataclass(slots=True)
class _LogitSlice:
    """Rows whose distributions are made together, with the hidden states they need.

    Rows are direct where nobody looks at the distribution itself: their tokens are all there is.
    """

    rows: list[_LogitRow]
    plan: ExitPlan
    is_direct: bool = False
    taps: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, layer: int, hidden: Tensor) -> None:
        rows = [self.rows[r].flat_row for r in self.plan.rows_at.get(layer, ())]
        if len(rows) == hidden.shape[0]:
            self.taps[layer] = hidden
        elif rows:
            self.taps[layer] = hidden[torch.tensor(rows).to(hidden.device, non_blocking=True)]

    def note(self, failures: dict[int, str], output: StepOutput) -> None:
        for row, message in failures.items():
            output.failures[self.rows[row].item.sequence.request.request_id] = message


class ModelRunner:
    """Computes scheduled batches on one model and one KV cache."""

    def __init__(self, model: MultiExitModel, kv_cache: PagedKVCache, config: EngineConfig) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.config = config
        self._planner = ExitPlanner(model.config)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step: write keys and values, choose tokens, score prompt tokens."""
        self.kv_cache.copy_blocks(batch.block_copies)
        choices, targets = self._logit_slices(batch)
        self._run_layers(batch, [*choices, *targets])
        output = StepOutput()
        for part in choices:
            if part.is_direct:
                self._choose_directly(part, output)
            else:
                self._choose(part, output)
        for part in targets:
            self._score(part, output)
        return output

    @torch.inference_mode()
    def prompt_scores(self, batch: ScheduledBatch) -> Tensor:
        """[tokens, vocab] float32 raw scores of every computed position, in its request's mode."""
        self.kv_cache.copy_blocks(batch.block_copies)
        rows = _all_rows(batch)
        parts = [self._slice(rows[i : i + MAX_LOGIT_ROWS]) for i in _steps(rows)]
        self._run_layers(batch, parts)
        results = [self._scores(part) for part in parts]
        for _, failures in results:
            for message in failures.values():
                raise RequestFailed(message)
        return torch.cat([scores for scores, _ in results])

    def _logit_slices(self, batch: ScheduledBatch) -> tuple[list[_LogitSlice], list[_LogitSlice]]:
        direct: list[_LogitRow] = []
        scored: list[_LogitRow] = []
        targets: list[_LogitRow] = []
        first_row = 0
        for item in batch.scheduled:
            request = item.sequence.request
            targets += _target_rows(item, first_row)
            first_row += item.num_tokens
            if item.reaches_end and request.score_from is None:
                choices = direct if self._is_direct(item.sequence) else scored
                choices.append(_LogitRow(first_row - 1, item))
        slices = [self._slice(direct, is_direct=True)] if direct else []
        if scored:
            slices.append(self._slice(scored))
        return slices, [self._slice(targets[i : i + MAX_LOGIT_ROWS]) for i in _steps(targets)]

    def _slice(self, rows: list[_LogitRow], is_direct: bool = False) -> _LogitSlice:
        modes: list[DecodingMode] = [row.item.sequence.request.decoding for row in rows]
        return _LogitSlice(rows, self._planner.plan(modes), is_direct)

    def _is_direct(self, sequence: TokenSequence) -> bool:
        request = sequence.request
        return (
            not request.is_beam_search
            and _num_choices(sequence) == 1
            and gives_tokens(request.decoding, self.model.heads)
            and not needs_scores(request.sampling, sequence.num_output_tokens, request.bad_words)
        )

    def _run_layers(self, batch: ScheduledBatch, slices: list[_LogitSlice]) -> None:
        forward = ForwardBatch.build(batch, self.config.block_size, self.config.device)
        tap_layers = {layer for part in slices for layer in part.plan.rows_at}
        depths = [item.sequence.request.depth for item in batch.scheduled]
        hidden = self.model.embed(forward.token_ids, forward.positions)
        for segment in plan_segments(depths, tap_layers):
            forward = forward.first(segment.num_seqs)
            hidden = self.model.run_layers(
                hidden[: forward.num_tokens], segment.start, segment.stop, self.kv_cache, forward
            )
            for part in slices:
                part.keep(segment.stop, hidden)

    def _scores(self, part: _LogitSlice) -> tuple[Tensor, dict[int, str]]:
        return mode_scores(part.plan, part.taps, self.model.heads)

    def _choose_directly(self, part: _LogitSlice, output: StepOutput) -> None:
        sequences = [row.item.sequence for row in part.rows]
        draws = _draws(sequences, self.config.device)
        chosen = mode_tokens(part.plan, part.taps, self.model.heads, draws)
        for sequence, token, logprob in zip(sequences, *_to_host(list(chosen)), strict=True):
            if math.isnan(logprob):
                output.failures[sequence.request.request_id] = NOT_A_NUMBER
            else:
                output.tokens.append((sequence, [ChosenToken(token)]))

    def _choose(self, part: _LogitSlice, output: StepOutput) -> None:
        scores, failures = self._scores(part)
        part.note(failures, output)
        beams: dict[str, list[int]] = {}
        plain: list[int] = []
        for index, row in enumerate(part.rows):
            request = row.item.sequence.request
            if request.request_id in output.failures:
                continue
            if request.is_beam_search:
                beams.setdefault(request.request_id, []).append(index)
            else:
                plain.append(index)
        if plain:
            self._choose_tokens(part, plain, scores, output)
        for indices in beams.values():
            indices.sort(key=lambda i: part.rows[i].item.sequence.index)
            self._choose_beams(part, indices, scores, output)

    def _choose_tokens(
        self, part: _LogitSlice, indices: list[int], scores: Tensor, output: StepOutput
    ) -> None:
        sequences = [part.rows[i].item.sequence for i in indices]
        copies = [_num_choices(sequence) for sequence in sequences]
        source = [i for i, count in zip(indices, copies, strict=True) for _ in range(count)]
        rows = [
            self._token_row(sequence, sequence.index + copy)
            for sequence, count in zip(sequences, copies, strict=True)
            for copy in range(count)
        ]
        if source != list(range(scores.shape[0])):
            scores = scores[torch.tensor(source).to(scores.device, non_blocking=True)]
        tokens = choose_tokens(scores, rows)
        chosen_scores = scores.gather(1, tokens[:, None])[:, 0]
        logprobs = self._alternatives(scores, tokens, rows)
        host_tokens, host_scores, *host_logprobs = _to_host([tokens, chosen_scores, *logprobs])

        start = 0
        for sequence, count in zip(sequences, copies, strict=True):
            own, start = range(start, start + count), start + count
            if any(math.isnan(host_scores[i]) for i in own):
                output.failures[sequence.request.request_id] = NOT_A_NUMBER
                continue
            if any(host_scores[i] == -math.inf for i in own):
                output.failures[sequence.request.request_id] = NO_TOKEN_LEFT
                continue
            asked = sequence.request.sampling.logprobs
            chosen = [_chosen(host_tokens, host_logprobs, i, asked) for i in own]
            output.tokens.append((sequence, chosen))

    def _alternatives(self, scores: Tensor, tokens: Tensor, rows: list[TokenRow]) -> list[Tensor]:
        num_top = _num_alternatives([row.params.logprobs for row in rows], scores.shape[1])
        return [] if num_top is None else list(token_logprobs(scores, tokens, num_top))

    def _choose_beams(
        self, part: _LogitSlice, indices: list[int], scores: Tensor, output: StepOutput
    ) -> None:
        sequences = [part.rows[i].item.sequence for i in indices]
        request = sequences[0].request
        rows = [self._token_row(sequence, 0) for sequence in sequences]
        count = beam_candidate_count(request, rows[0])
        running = [sequence.cumulative_logprob for sequence in sequences]
        own = scores[torch.tensor(indices).to(scores.device, non_blocking=True)]
        values, ids = beam_candidates(own, rows, running, min(count, own.shape[1]))
        host_values, host_ids = _to_host([values, ids])
        if any(math.isnan(value) for beam in host_values for value in beam):
            output.failures[request.request_id] = NOT_A_NUMBER
            return
        output.beams.append((request, BeamCandidates(host_values, host_ids)))

    def _token_row(self, sequence: TokenSequence, index: int) -> TokenRow:
        request = sequence.request
        return TokenRow(
            params=request.sampling,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            seed=sequence_seed(request.seed, index),
            eos_token_ids=request.ending_token_ids,
            bad_words=request.bad_words,
        )

    def _score(self, part: _LogitSlice, output: StepOutput) -> None:
        scores, failures = self._scores(part)
        part.note(failures, output)
        requests = [row.item.sequence.request for row in part.rows]
        targets = [row.target for row in part.rows]
        asked = [request.sampling.prompt_logprobs for request in requests]
        num_top = _num_alternatives(asked, scores.shape[1]) or 0
        wanted = torch.tensor(targets).to(scores.device, non_blocking=True)
        found = token_logprobs(scores, wanted, num_top)
        best = scores.argmax(-1)
        greedy, tokens, *logprobs = _to_host([best, wanted, *found])
        for i, request in enumerate(requests):
            chosen = _chosen(tokens, logprobs, i, asked[i] or 0)
            assert chosen.logprob is not None and chosen.rank is not None
            if math.isnan(chosen.logprob):
                output.failures[request.request_id] = NOT_A_NUMBER
            scored = ScoredToken(
                chosen.token_id,
                chosen.logprob,
                chosen.rank,
                greedy[i] == chosen.token_id,
                chosen.alternatives,
            )
            if not output.scored or output.scored[-1][0] is not request:
                output.scored.append((request, []))
            output.scored[-1][1].append(scored)


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one of a request's ``n`` continuations; the first one has the request's own."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63


def beam_candidate_count(request: Request, row: TokenRow) -> int:
    """Candidates per beam that always leave ``num_beams`` which do not end."""
    return max(2, 1 + len(row.eos_token_ids)) * request.sampling.num_beams


def _chosen(
    tokens: list[int], logprobs: list[list[Any]], row: int, asked: int | None
) -> ChosenToken:
    """One row of a step's results; ``logprobs`` as ``token_logprobs`` gives them, or nothing."""
    if asked is None:
        return ChosenToken(tokens[row])
    values, ids, own, ranks = logprobs
    count = len(ids[row]) if asked == -1 else asked
    best = tuple(zip(ids[row][:count], values[row][:count], strict=True))
    return ChosenToken(tokens[row], own[row], ranks[row], best)


def _draws(sequences: list[TokenSequence], device: torch.device) -> Draws:
    heats = [s.request.sampling.temperature for s in sequences]
    state = torch.tensor(
        [
            [sequence_seed(s.request.seed, s.index) for s in sequences],
            [s.num_output_tokens for s in sequences],
        ]
    )
    seeds, positions = state.to(device, non_blocking=True)
    temperature = torch.tensor(heats, dtype=torch.float32).to(device, non_blocking=True)
    return Draws(temperature, seeds, positions)


def _num_choices(sequence: TokenSequence) -> int:
    return sequence.request.sampling.n if sequence.num_output_tokens == 0 else 1


def _target_rows(item: ScheduledSequence, first_row: int) -> list[_LogitRow]:
    request = item.sequence.request
    first = request.first_position_with_logprobs
    if first is None:
        return []
    next_wanted = first + len(request.scored)
    prompt = request.prompt_token_ids
    return [
        _LogitRow(first_row + position - 1 - item.start, item, prompt[position])
        for position in range(max(next_wanted, item.start + 1), min(item.stop + 1, len(prompt)))
    ]


def _all_rows(batch: ScheduledBatch) -> list[_LogitRow]:
    items = [item for item in batch.scheduled for _ in range(item.num_tokens)]
    return [_LogitRow(row, item) for row, item in enumerate(items)]


def _steps(rows: Sequence[_LogitRow]) -> range:
    return range(0, len(rows), MAX_LOGIT_ROWS)


def _num_alternatives(asked: list[int | None], vocab_size: int) -> int | None:
    """The most alternatives that any row asks for; None when no row asks."""
    counts = [vocab_size if k == -1 else min(k, vocab_size) for k in asked if k is not None]
    return max(counts, default=None)


def _to_host(tensors: list[Tensor]) -> list[list[Any]]:
    """The step's one wait for the device: all results in one go, as lists."""
    on_host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.current_stream().synchronize()
    return [tensor.tolist() for tensor in on_host]
