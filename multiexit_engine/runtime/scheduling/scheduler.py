"""Which tokens of which sequences a step computes, and on which KV blocks.

First come, first served; the youngest gives way. Knows nothing of tensors or of tokens' choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from time import perf_counter
from types import MappingProxyType
from typing import Any

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence
from multiexit_engine.cache.block_manager import BlockManager
from multiexit_engine.config import EngineConfig
from multiexit_engine.outputs import FinishReason
from multiexit_engine.request import Held, Joining, Request, Sequence, SequenceStatus
from multiexit_engine.runtime.scheduling.draft_lengths import DraftLengths
from multiexit_engine.runtime.scheduling.limits import check_fits
from multiexit_engine.runtime.scheduling.queues import Queues, Unit
from multiexit_engine.runtime.scheduling.step_plan import StepPlan, less_and_less

NOBODY: Mapping[Sequence, Any] = MappingProxyType({})


class Scheduler:
    """Shares seats, tokens of a step and KV blocks among requests.

    Every step goes to the running sequences first, in order of arrival: each gets its next token,
    a prompt that was cut gets what is left. Then waiting requests are admitted from the front
    while seats, tokens and blocks last. A sequence that finds no block preempts the youngest
    running one, which computes its tokens again later; so the oldest request always runs.

    The owner calls ``schedule``, runs the step, calls ``advance``, and only then appends new
    tokens, forks, replaces or finishes sequences. Not thread-safe.
    """

    def __init__(self, config: EngineConfig, draft_lengths: DraftLengths | None = None) -> None:
        self._config = config
        self._draft_lengths = draft_lengths or DraftLengths()
        self._blocks = BlockManager(config.num_kv_blocks, config.block_size, config.prefix_caching)
        self._queues = Queues(config.max_batch_size)
        self._arrivals = count()
        self._units: dict[Sequence, Unit] = {}
        self._living: dict[str, list[Unit]] = {}
        self._next_turn = (0, 0)
        self._num_preemptions = 0
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._living)

    @property
    def num_running(self) -> int:
        """Running sequences."""
        return self._queues.num_running_sequences

    @property
    def num_waiting(self) -> int:
        """Waiting requests; of an ``n`` > 1 each preempted sequence counts."""
        return len(self._queues.waiting)

    @property
    def num_preemptions(self) -> int:
        return self._num_preemptions

    @property
    def prefix_query_tokens(self) -> int:
        """Prompt tokens of all admitted requests."""
        return self._prefix_query_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """Those of them that came from the prefix cache."""
        return self._prefix_hit_tokens

    @property
    def num_blocks(self) -> int:
        return self._blocks.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence owns, those of the prefix cache included."""
        return self._blocks.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that no sequence owns and the prefix cache can find."""
        return self._blocks.num_cached_blocks

    def check_fits(self, request: Request) -> None:
        """Raise ValueError if the request could never run, however empty the engine is."""
        check_fits(request, self._config)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn; ``request.sequences`` holds its first sequence.

        Raises:
            ValueError: as ``check_fits``, or a living request has the same id.
        """
        if request.request_id in self._living:
            raise ValueError(f"request_id={request.request_id!r}: a living request has this id")
        self.check_fits(request)
        (sequence,) = request.sequences
        unit = Unit(request, (next(self._arrivals), sequence.index), [sequence], request.width)
        self._units[sequence] = unit
        self._living[request.request_id] = [unit]
        self._queues.waiting.append(unit)

    def schedule(self) -> ScheduledBatch | None:
        """The next step, its blocks allocated; None when there is nothing to compute."""
        step = StepPlan(self._config.max_num_batched_tokens)
        if self._queues.num_running_sequences > step.num_tokens_left:
            self._continue_in_turn(step)
            return step.batch()
        num_preemptions = self._num_preemptions
        self._continue_running(step)
        if self._num_preemptions == num_preemptions:
            while self._admit_first_waiting(step):
                pass
        self._add_drafts(step)
        return step.batch()

    def advance(
        self,
        batch: ScheduledBatch,
        waiting: Mapping[Sequence, tuple[Joining, ...]] = NOBODY,
        held: Mapping[Sequence, Held] = NOBODY,
        unsettled: Collection[Sequence] = (),
    ) -> None:
        """Record that a step ran: its tokens are computed, full blocks can be found by others.

        Sequences that finished since ``schedule`` are skipped. Call it before new tokens are
        appended.

        Args:
            batch: what ran.
            waiting: the sequences of which tokens still lack some layers, and which tokens.
            held: those of them whose last token goes on in a later step.
            unsettled: those of which this is not known yet. ``waiting`` stays what it was, and
                nothing of them is found, until it is called again for them.
        """
        for chunk in batch.scheduled:
            sequence = chunk.sequence
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            if sequence in unsettled:
                sequence.num_computed_tokens = chunk.stop
                continue
            start = min(sequence.num_exact_tokens, chunk.start)
            sequence.waiting, sequence.held = waiting.get(sequence, ()), held.get(sequence)
            sequence.num_computed_tokens = chunk.stop - (sequence.held is not None)
            self._commit(sequence, start, sequence.num_exact_tokens)

    def accept_drafts(self, sequence: Sequence, count: int) -> None:
        """Record that the ``count`` tokens before a sequence's last one are computed, too.

        They were drafts of the step that ran. Call it after ``advance`` and after the tokens were
        appended.
        """
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens = start + count
        self._commit(sequence, start, start + count)

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """A running sibling with the same tokens, on the same blocks until either writes.

        The caller puts it into ``request.sequences``; of beams it then calls ``replace``.
        """
        unit = self._units[sequence]
        assert unit.is_running, "only a running sequence can be forked"
        assert not sequence.waiting, "rows of a shared block would be completed twice"
        sibling = Sequence(
            request=sequence.request,
            index=index,
            token_ids=list(sequence.token_ids),
            num_computed_tokens=sequence.num_computed_tokens,
            block_table=self._blocks.fork(sequence.block_table),
            source_table=self._blocks.fork(sequence.source_table),
            status=SequenceStatus.RUNNING,
            chosen=list(sequence.chosen),
            cumulative_logprob=sequence.cumulative_logprob,
            exit_layers=list(sequence.exit_layers),
            drafted=list(sequence.drafted),
            confidences=list(sequence.confidences),
        )
        if sequence.request.is_beam_search:
            unit.sequences.append(sibling)
        else:
            unit = self._queues.split_off(unit, sibling)
            self._living[sequence.request.request_id].append(unit)
        self._units[sibling] = unit
        return sibling

    def replace(self, request: Request, sequences: list[Sequence]) -> None:
        """Make these, old beams or forks of them, the beams of a living request.

        Its other ones end (status FINISHED, no reason) and lose their blocks.
        """
        kept = set(sequences)
        for unit in list(self._living[request.request_id]):
            for sequence in list(unit.sequences):
                if sequence not in kept:
                    self._end(sequence)
            unit.sequences.sort(key=sequences.index)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and free its blocks."""
        sequence.finish_reason = reason
        self._end(sequence)

    def abort(self, request_id: str) -> Request | None:
        """End what still lives of a request, running or waiting; None if none has this id."""
        units = self._living.get(request_id)
        if units is None:
            return None
        request = units[0].request
        for unit in list(units):
            for sequence in list(unit.sequences):
                self.finish(sequence, FinishReason.ABORT)
        return request

    def check_integrity(self) -> None:
        """Raise AssertionError if blocks, seats or queues contradict each other."""
        queues = self._queues
        tables = [table for s in self._units for table in (s.block_table, s.source_table)]
        self._blocks.check_integrity(tables)
        units = [*queues.running, *queues.waiting]
        assert set(units) == set(self._units.values()), "a unit is lost"
        assert all(u.order < v.order for u, v in zip(units, units[1:], strict=False)), "order"
        seats = sum(unit.seats for unit in queues.running) + queues.num_seats_left
        assert seats == self._config.max_batch_size, f"{seats} seats"
        assert queues.num_seats_left >= 0, f"{queues.num_seats_left} seats left"
        for sequence in (s for unit in queues.waiting for s in unit.sequences):
            assert sequence.status is SequenceStatus.WAITING, sequence.status
            assert not sequence.block_table + sequence.source_table, "waiting, but owns blocks"
            assert not sequence.num_computed_tokens, "a waiting sequence has computed tokens"

    def _continue_running(self, step: StepPlan) -> None:
        """In order of arrival; a prompt may go on in the youngest only, copied output in all."""
        for unit in list(self._queues.running):
            if unit.is_running:
                self._compute(unit, step.num_tokens_left, step)

    def _continue_in_turn(self, step: StepPlan) -> None:
        """One token for as many sequences as the step has, beginning where the last one ended."""
        for unit in self._queues.running_from(self._next_turn):
            if not unit.is_running:
                continue
            if len(unit.sequences) > step.num_tokens_left:
                self._next_turn = unit.order
                return
            self._compute(unit, len(unit.sequences), step)

    def _compute(self, unit: Unit, num_tokens: int, step: StepPlan) -> None:
        """Give a running unit up to ``num_tokens``; it may preempt younger ones, or itself."""
        for sequence, wanted in unit.pending():
            granted = min(wanted, num_tokens)
            if not granted:
                return
            num_tokens -= granted
            start = sequence.num_computed_tokens
            if not self._find_blocks(unit, sequence, start + granted, step):
                return
            step.add_chunk(unit, ScheduledSequence(sequence, start, granted))

    def _add_drafts(self, step: StepPlan) -> None:
        """Let sequences draft with the tokens and blocks that nobody else wants in this step."""
        chunks = step.chunks()
        lengths = self._draft_lengths.of([chunk for _, chunk in chunks], self._config)
        if not any(lengths):
            return
        for (unit, chunk), wanted in zip(chunks, lengths, strict=True):
            room = min(step.num_tokens_left, self._config.max_model_len - chunk.stop)
            for num_drafts, others in less_and_less(chunk.sequence, wanted, room):
                table, stop = chunk.sequence.block_table, chunk.stop + num_drafts + len(others)
                copies = self._blocks.make_writable(table, chunk.start, stop)
                if copies is not None:
                    step.add_copies(unit, copies)
                    step.extend(unit, chunk, num_drafts, others)
                    break

    def _find_blocks(self, unit: Unit, sequence: Sequence, stop: int, step: StepPlan) -> bool:
        """Own the blocks of the tokens up to ``stop``; False if the unit itself had to give way."""
        start, table = sequence.num_computed_tokens, sequence.block_table
        while (copies := self._blocks.make_writable(table, start, stop)) is None:
            youngest = self._preempt_youngest()
            step.drop(youngest)
            if youngest is unit:
                return False
        if copies:
            step.add_copies(unit, copies)
        return True

    def _preempt_youngest(self) -> Unit:
        unit = self._queues.preempt_youngest()
        self._num_preemptions += 1
        for sequence in unit.sequences:
            self._release_blocks(sequence)
            sequence.begin_again()
        return unit

    def _admit_first_waiting(self, step: StepPlan) -> bool:
        """Admit the oldest waiting unit if there is room for it."""
        if not self._queues.waiting or not step.num_tokens_left:
            return False
        unit = self._queues.waiting[0]
        if unit.seats > self._queues.num_seats_left or len(unit.sequences) > step.num_tokens_left:
            return False
        source = self._living_source(unit.request)
        num_unread = 0 if source else len(unit.request.source_token_ids)
        if not step.has_room_for_source(num_unread) or not self._take_blocks(unit, source):
            return False
        if num_unread:
            step.add_unread(unit.sequences[0])
        self._queues.admit_first()
        for sequence in unit.sequences:
            sequence.status = SequenceStatus.RUNNING
        self._note_admission(unit)
        self._compute(unit, step.num_tokens_left, step)
        return True

    def _living_source(self, request: Request) -> list[int]:
        """The source blocks of a running sibling, which others of the request can share."""
        siblings = (s for unit in self._living[request.request_id] for s in unit.sequences)
        return next((s.source_table for s in siblings if s.source_table), [])

    def _take_blocks(self, unit: Unit, source: list[int]) -> bool:
        """Own blocks for all known tokens of a unit and its source, or leave everything as it is.

        Blocks for the whole prompt are taken at once: a prompt that ran out of blocks halfway
        would have wasted the steps before. Beside others it also leaves a block for each sequence
        to grow into, so that it is not admitted only to be preempted.
        """
        if unit.prefix_keys is None:
            salt = unit.request.prefix_salt
            unit.prefix_keys = [
                self._blocks.prefix_keys(s.token_ids[: s.num_reusable_at_most], salt)
                for s in unit.sequences
            ]
        tables = [self._blocks.match_keys(k, unit.request.depth) for k in unit.prefix_keys]
        needed = sum(self._blocks.num_blocks_for(s.num_tokens) for s in unit.sequences)
        num_source_tokens = 0 if source else len(unit.request.source_token_ids)
        needed += self._blocks.num_blocks_for(num_source_tokens) - sum(map(len, tables))
        if self._queues.running:
            taken = self._config.max_batch_size - self._queues.num_seats_left
            needed += taken + unit.seats - 1
        if needed > self._blocks.num_free_blocks:
            for table in tables:
                self._blocks.free(table)
            return False
        for sequence, table in zip(unit.sequences, tables, strict=True):
            sequence.block_table = table
            sequence.num_computed_tokens = len(table) * self._config.block_size
            self._blocks.make_writable(table, sequence.num_computed_tokens, sequence.num_tokens)
        for sequence in unit.sequences:
            sequence.source_table = self._blocks.fork(source)
            self._blocks.make_writable(sequence.source_table, 0, num_source_tokens)
            source, num_source_tokens = sequence.source_table, 0
        unit.prefix_keys = None
        return True

    def _note_admission(self, unit: Unit) -> None:
        if unit.was_admitted:
            return
        unit.was_admitted = True
        (sequence,) = unit.sequences
        unit.request.admitted_at = perf_counter()
        unit.request.num_cached_tokens = sequence.num_computed_tokens
        self._prefix_query_tokens += sequence.num_tokens
        self._prefix_hit_tokens += sequence.num_computed_tokens

    def _commit(self, sequence: Sequence, start: int, stop: int) -> None:
        """Let others find the blocks that became full with the tokens ``[start, stop)``."""
        depth, salt = sequence.request.depth, sequence.request.prefix_salt
        self._blocks.commit(sequence.block_table, sequence.token_ids, start, stop, depth, salt)

    def _release_blocks(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.block_table + sequence.source_table)
        sequence.block_table, sequence.source_table = [], []

    def _end(self, sequence: Sequence) -> None:
        """Finish a sequence; one that the scheduler does not know only changes its status."""
        sequence.status = SequenceStatus.FINISHED
        unit = self._units.pop(sequence, None)
        if unit is None:
            return
        self._release_blocks(sequence)
        unit.sequences.remove(sequence)
        if unit.sequences:
            return
        self._queues.remove(unit)
        request_id = unit.request.request_id
        self._living[request_id].remove(unit)
        if not self._living[request_id]:
            del self._living[request_id]
