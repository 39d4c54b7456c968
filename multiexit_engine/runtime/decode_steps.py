"""Steps in which every sequence gets one plain token: one copy in, one copy out, no wait between.

Each step is a row of pieces (spans of layers between the exits that somebody reads, then heads)
over memory that stays where it is, so that pieces can be captured as graphs, and the next step can
be launched before the tokens of this one are known. Knows nothing of queues or texts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.batch import (
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    SequenceLayout,
    StepOutput,
)
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.exits import Draws, pair_tokens, takes_pair
from multiexit_engine.decoding.plan import ExitPlan, ExitPlanner, plan_segments
from multiexit_engine.layers.exit_heads import Head, HeadOperands
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.ops import shared_head_tokens
from multiexit_engine.ops.tokens import RowGroup
from multiexit_engine.params import Contrast, Exit, Original
from multiexit_engine.request import ChosenToken, sequence_seed
from multiexit_engine.runtime.choosing import TokenChooser
from multiexit_engine.runtime.chosen_rows import NOT_A_NUMBER
from multiexit_engine.runtime.decode_memory import (
    MAX_GROUPS,
    TURNS,
    DecodeMemory,
    DecodeRow,
)
from multiexit_engine.runtime.graphs import Pieces
from multiexit_engine.runtime.logit_rows import LogitRow
from multiexit_engine.runtime.step_clock import StepClock

PLAIN = (Original, Exit, Contrast)


class _Part(NamedTuple):
    """Rows with the same heads.

    Attributes:
        place: of the list of these rows in memory; None for the first rows of the step.
        upper: their head.
        lower: what it is contrasted with, if anything.
        size: how many, padding included.
    """

    place: int | None
    upper: Head
    lower: Head | None
    size: int


class LaunchedStep:
    """A step that is on its way.

    Attributes:
        batch: what it computes.
        rows: where each of its sequences stands.
        clock: what the step takes.
    """

    def __init__(
        self,
        batch: ScheduledBatch,
        memory: DecodeMemory,
        turn: int,
        clock: StepClock,
        device: torch.device,
    ) -> None:
        self.batch = batch
        self.rows = {item.sequence: row for row, item in enumerate(batch.scheduled)}
        self.clock = clock
        self._memory = memory
        self._turn = turn
        self._done = torch.get_device_module(device).Event()
        self._done.record()

    def wait(self) -> StepOutput:
        """What it chose, as soon as it is known; sequences that ended meanwhile are left out."""
        self._done.synchronize()
        tokens, logprobs, counts = self._memory.found(self._turn, len(self.rows))
        output = StepOutput()
        for sequence, row in self.rows.items():
            if sequence.is_finished:
                continue
            output.note_candidates([counts[row]])
            if math.isnan(logprobs[row]):
                output.failures[sequence.request.request_id] = NOT_A_NUMBER
            else:
                output.tokens.append((sequence, [ChosenToken(tokens[row])]))
        return output


class DecodeSteps:
    """Launches plain steps of one decoder-only model.

    Args:
        model: the decoder.
        kv_cache: of the model, with one block more than anybody can own.
        chooser: says which rows are chosen without a look at their scores.
        config: the engine's limits.
        pieces: how pieces run.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        chooser: TokenChooser,
        config: EngineConfig,
        pieces: Pieces,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._chooser = chooser
        self._planner = ExitPlanner(model.config)
        self._pieces = pieces
        self._device = config.device
        self._memory = DecodeMemory(
            config.max_batch_size,
            config.max_model_len,
            config.block_size,
            config.num_kv_blocks,
            config.device,
        )
        self._starts = torch.arange(
            config.max_batch_size + 1, dtype=torch.int32, device=config.device
        )
        # the states after each layer where a span of layers ends
        self._states: dict[int, Tensor] = {}
        self._matrices: dict[Head, tuple[int, int]] = {}
        self._turn = 0

    def fits(self, batch: ScheduledBatch) -> bool:
        """Whether every sequence of a step gets one token, chosen by plain means."""
        if batch.unread or not all(map(_is_one_token, batch.scheduled)):
            return False
        if not all(map(self._is_plain, _rows(batch))):
            return False
        return len(self._plan(batch).groups) <= MAX_GROUPS

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None = None) -> LaunchedStep:
        """Start a step that ``fits``; ``before`` is choosing the tokens that are not known."""
        clock = StepClock(self._device)
        clock.mark()
        plan = self._plan(batch)
        num_rows = len(batch.scheduled)
        size = self._pieces.size(num_rows)
        bound = self._pieces.bound(max(item.stop for item in batch.scheduled))
        groups = [group.rows for group in plan.groups] if len(plan.groups) > 1 else []
        self._turn = (self._turn + 1) % TURNS
        self._memory.send(self._turn, _decode_rows(batch, plan, before), size, groups)
        self._run_layers(batch, plan, bound)
        for parts in self._by_matrix(plan, size):
            self._pieces.run(("heads", parts), size, partial(self._choose, parts))
        self._memory.fetch(self._turn)
        clock.mark()
        return LaunchedStep(batch, self._memory, self._turn, clock, self._device)

    def _is_plain(self, row: LogitRow) -> bool:
        request = row.sequence.request
        return (
            isinstance(row.mode, PLAIN)
            and takes_pair(row.mode, self._model.heads)
            and request.score_from is None
            and not request.source_token_ids
            and request.sampling.prompt_logprobs is None
            and row.sequence.grammar is None
            and not request.continuation
            and self._chooser.is_direct(row)
        )

    def _plan(self, batch: ScheduledBatch) -> ExitPlan:
        return self._planner.plan([item.sequence.request.decoding for item in batch.scheduled])

    def _run_layers(self, batch: ScheduledBatch, plan: ExitPlan, bound: int) -> None:
        depths = [item.sequence.request.depth for item in batch.scheduled]
        for segment in plan_segments(depths, plan.rows_at):
            # rows that have left may stand where padding would: what they write nobody reads
            size = self._pieces.size(segment.num_seqs)
            call = partial(self._span, segment.start, segment.stop, size, bound)
            self._pieces.run(("layers", segment.start, segment.stop, size, bound), size, call)

    def _span(self, start: int, stop: int, size: int, bound: int) -> None:
        """Run a span of layers on the first ``size`` rows, from the memory of states to it."""
        inputs = self._memory.inputs
        positions = inputs["positions"][:size]
        layout = SequenceLayout(
            query_lens=(1,) * size,
            context_lens=(bound,) * size,
            cu_query_lens=self._starts[: size + 1],
            context_lens_device=inputs["contexts"][:size],
            block_tables=inputs["tables"][:size],
            has_bounds=True,
        )
        tokens = self._tokens(size)
        forward = ForwardBatch(tokens, positions, inputs["slots"][:size], layout)
        hidden = self._states[start][:size] if start else self._model.embed(tokens, positions)
        hidden = self._model.run_layers(hidden, start, stop, self._kv_cache, forward)
        if stop not in self._states:
            self._states[stop] = hidden.new_zeros(self._memory.spare_row + 1, hidden.shape[1])
        self._states[stop][:size] = hidden

    def _tokens(self, size: int) -> Tensor:
        """[size] int64: from the host, or where only the device knows them from there."""
        known = self._memory.inputs["tokens"][:size]
        sources = self._memory.inputs["sources"][:size]
        chosen = self._memory.results["tokens"][sources.clamp(min=0)]
        return torch.where(sources < 0, known, chosen)

    def _by_matrix(self, plan: ExitPlan, size: int) -> list[tuple[_Part, ...]]:
        """The groups of rows, those together whose upper heads have one matrix."""
        if len(plan.groups) == 1:
            (group,) = plan.groups
            return [(_Part(None, group.upper, group.lower, size),)]
        found: dict[tuple[int, int], list[_Part]] = {}
        for place, group in enumerate(plan.groups):
            part = _Part(place, group.upper, group.lower, self._pieces.size(len(group.rows)))
            found.setdefault(self._matrix(group.upper), []).append(part)
        return [tuple(parts) for parts in found.values()]

    def _matrix(self, head: Head) -> tuple[int, int]:
        """What is the same for heads with the same matrix and bias."""
        if head not in self._matrices:
            operands = self._model.heads.operands(head, self._states[head.layer][:1])
            self._matrices[head] = id(operands.weight), id(operands.bias)
        return self._matrices[head]

    def _choose(self, parts: tuple[_Part, ...]) -> None:
        """Choose tokens of the rows of groups whose heads have one matrix, which is read once."""
        inputs, results = self._memory.inputs, self._memory.results
        rows = [self._rows_of(part) for part in parts]
        own = rows[0] if len(parts) == 1 else torch.cat([r for r in rows if isinstance(r, Tensor)])
        draws = Draws(inputs["temperatures"][own], inputs["seeds"][own], inputs["counts"][own])
        alpha = inputs["alphas"][own]
        counts = torch.zeros_like(draws.seeds, dtype=torch.int32)
        pairs = list(zip(parts, rows, strict=True))
        uppers = [self._operands(part.upper, place) for part, place in pairs]
        lowers = [part.lower and self._operands(part.lower, place) for part, place in pairs]
        if len(parts) == 1:
            found = pair_tokens(uppers[0], lowers[0], alpha, draws, counts)
        else:
            hidden = torch.cat([upper.hidden for upper in uppers])
            groups = [RowGroup(p.size, *(low or ())) for p, low in zip(parts, lowers, strict=True)]
            _, weight, bias = uppers[0]
            found = shared_head_tokens(hidden, weight, bias, groups, alpha, None, *draws, counts)
        results["tokens"][own], results["logprobs"][own] = found[0], found[1].float()
        results["candidates"][own] = counts

    def _rows_of(self, part: _Part) -> Tensor | slice:
        if part.place is None:
            return slice(part.size)
        return self._memory.inputs["groups"][part.place][: part.size]

    def _operands(self, head: Head, rows: Tensor | slice) -> HeadOperands:
        return self._model.heads.operands(head, self._states[head.layer][rows])


def _rows(batch: ScheduledBatch) -> list[LogitRow]:
    """The rows that choose, one for each sequence; a token that is expected counts as a draft."""
    return [
        LogitRow(index, item.start, sequence, sequence.request.decoding, sequence.num_expected)
        for index, item in enumerate(batch.scheduled)
        for sequence in (item.sequence,)
    ]


def _is_one_token(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1 and not item.num_drafts and item.reaches_end


def _decode_rows(
    batch: ScheduledBatch, plan: ExitPlan, before: LaunchedStep | None
) -> list[DecodeRow]:
    alphas = {
        row: alpha
        for group in plan.groups
        if group.alphas
        for row, alpha in zip(group.rows, group.alphas, strict=True)
    }
    rows = []
    for place, item in enumerate(batch.scheduled):
        sequence, request = item.sequence, item.sequence.request
        is_known = item.start < len(sequence.token_ids)
        assert is_known or before is not None, "nobody chooses this token"
        rows.append(
            DecodeRow(
                token=sequence.token_ids[item.start] if is_known else 0,
                source=-1 if is_known or before is None else before.rows[sequence],
                position=item.start,
                block_table=sequence.block_table,
                seed=sequence_seed(request.seed, sequence.index),
                num_output_tokens=item.stop - len(request.prompt_token_ids),
                temperature=request.sampling.temperature,
                alpha=alphas.get(place, 1.0),
            )
        )
    return rows
