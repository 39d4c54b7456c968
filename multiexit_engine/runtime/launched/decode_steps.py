"""Steps that are launched as a whole: nobody waits before the end, or before the next step.

Rows that get one token each run through pieces over memory that stays where it is, beside them
chunks of prompts as they come. Rows of plain modes choose in pieces, too; what others want of
their distributions is launched after them. Knows nothing of queues or texts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence, StepOutput
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig, ModelConfig
from multiexit_engine.decoding.plan import (
    ExitPlan,
    ExitPlanner,
    HeadGroup,
    plan_segments,
)
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.ops.best_tokens import MOST_LISTED
from multiexit_engine.params import (
    Contrast,
    DecodingMode,
    EarlyExit,
    Exit,
    Original,
    SamplingParams,
)
from multiexit_engine.runtime.device.graphs import Pieces
from multiexit_engine.runtime.device.packed import TURNS
from multiexit_engine.runtime.device.step_clock import StepClock
from multiexit_engine.runtime.drafts.draft_rounds import Items, NumKeys, Rounds
from multiexit_engine.runtime.launched.decode_memory import MAX_GROUPS, DecodeMemory
from multiexit_engine.runtime.launched.decode_pieces import DecodePieces
from multiexit_engine.runtime.launched.decode_rows import alphas_of, decode_rows
from multiexit_engine.runtime.launched.edit_memory import EditMemory
from multiexit_engine.runtime.launched.exit_plan import ExitStep
from multiexit_engine.runtime.launched.exit_steps import ExitSteps
from multiexit_engine.runtime.launched.launched_step import ComingStep, LaunchedStep
from multiexit_engine.runtime.launched.piece_drafter import PieceDrafter
from multiexit_engine.runtime.launched.plain_rows import (
    edits_of,
    head_wishes,
    lists_best,
    num_edits_at_most,
)
from multiexit_engine.runtime.launched.prompt_chunks import PromptChunks, waiting_again
from multiexit_engine.runtime.launched.state_rows import StateRows
from multiexit_engine.runtime.launched.warm_steps import WarmUp
from multiexit_engine.runtime.launched.wished_tokens import WishedTokens
from multiexit_engine.runtime.rows.choosing import TokenChooser
from multiexit_engine.runtime.rows.chosen_rows import Choice, Coming, direct_choices
from multiexit_engine.runtime.rows.flight import Flight, Place
from multiexit_engine.runtime.rows.logit_rows import LogitRow, choice_rows, target_rows
from multiexit_engine.runtime.rows.logit_slices import LogitSlice

PLAIN = (Original, Exit, Contrast)
# Rows of the decode memory: so many for each sequence, and some for long drafts of few. The last
# rows of chunks stand behind the others' padding.
MOST_ROUNDS, SPARE_ROWS = 4, 64


class StepRows(NamedTuple):
    """The rows of a step.

    Attributes:
        choosing: those that choose tokens.
        rounds: those that get one token each.
        num_ends: chunks that come to their ends, whose last rows stand behind all others.
        early: those that choose their exit, if any do.
    """

    choosing: Sequence[LogitRow]
    rounds: Rounds
    num_ends: int
    early: ExitStep | None


class DecodeSteps:
    """Launches steps of one model.

    Args:
        model: the decoder, and what reads its sources, if it has any.
        kv_cache: of the model, with one block more than anybody can own.
        states: where rows of chunks would wait at exits, which they never do here.
        chooser: chooses tokens, and says which rows need no look at their scores.
        config: the engine's limits.
        pieces: how pieces run.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        states: ExitStates,
        chooser: TokenChooser,
        config: EngineConfig,
        pieces: Pieces,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._exit_states = states
        self._chooser = chooser
        self._planner = ExitPlanner(model.config)
        self._config = config
        self._device = config.device
        self._memory = DecodeMemory(
            MOST_ROUNDS * config.max_batch_size + SPARE_ROWS,
            most_keys(model.config, config),
            config.block_size,
            config.num_kv_blocks,
            min(MOST_LISTED, model.config.vocab_size),
            config.device,
        )
        num_rows = self._memory.spare_row + 1
        self._edits = EditMemory(num_rows, model.config.vocab_size, config.device)
        tokens = WishedTokens(self._memory, self._edits)
        self._pieces = DecodePieces(model, kv_cache, self._memory, tokens, pieces)
        self._drafter = PieceDrafter(model.config, self._memory, self._pieces, chooser)
        self._chunks = PromptChunks(model, kv_cache, states, self._pieces)
        own = self._memory, self._pieces, tokens, pieces
        self._exit_steps = ExitSteps.of(model, kv_cache, states, chooser, config, *own)
        parts = self._memory, self._edits, self._pieces, self._drafter, self._exit_steps, pieces
        self._warm_up = WarmUp(model.config, config, *parts)
        self._turn = 0

    def plan(self, batch: ScheduledBatch, before: LaunchedStep | None) -> StepRows | None:
        """How a step lies that needs the host at its end only; None for another.

        Args:
            batch: the step.
            before: the step that is choosing the tokens that are not known.
        """
        rows = choice_rows(enumerate(batch.scheduled), {})
        rounds, num_ends = self._rounds(batch)
        early = self._exit_steps.step(batch, rows, rounds, before)
        if early is not None and not self._exit_steps.fits(early, num_ends, self._edits.most):
            return None
        has_stream = early is not None and early.has_stream
        drafting = rows, rounds, num_ends, has_stream
        if _has_drafts(batch) and not self._drafter.fits(batch, *drafting):
            return None
        expecting = [item for item in batch.scheduled if item.sequence.num_expected]
        knows_enough = not expecting or (
            before is not None
            and all(_is_one_token(item) for item in expecting)
            and all(item.sequence in before.coming.token_rows for item in expecting)
            and self._knows_enough(rows)
        )
        return StepRows(rows, rounds, num_ends, early) if knows_enough else None

    def launch(
        self, batch: ScheduledBatch, parts: StepRows, before: LaunchedStep | None
    ) -> LaunchedStep:
        """Start a step that lies so; ``before`` is choosing the tokens that are not known."""
        clock = StepClock(self._device)
        self._turn = turn = (self._turn + 1) % TURNS
        rows, rounds, num_ends, early = parts
        items = enumerate(batch.scheduled)
        chunks = [pair for pair in items if not _is_one_token(pair[1])]
        num_running = rounds.num_rows if early is None else early.layout.num_rows
        places = rounds.places | _places_of_chunks(chunks, num_running)
        plain, looked_at = self._by_kind(rows)
        plan = self._plan(plain)
        groups, are_listed = _groups_in_memory(plan, plain, places, rounds)
        slices = self._chooser.slices(looked_at)
        scoring = target_rows(chunks)
        fixed = [row for row in scoring if not isinstance(row.mode, EarlyExit)]
        targets, exit_targets = self._chooser.scored_slices(fixed), self._exit_steps.scores(scoring)
        layers = {layer for p in (plan, *(s.plan for s in slices)) for layer in p.rows_at}
        inputs = decode_rows(batch, places, alphas_of(plan, plain), before)
        if early is not None:
            places |= early.layout.places
            inputs |= self._exit_steps.waiting_rows(early)
            self._exit_steps.send(early, turn, places, num_ends)
        self._memory.send(
            turn,
            [inputs.get(row) for row in range(rounds.num_rows)],
            [inputs.get(row) for row in range(rounds.num_rows, num_running + num_ends)],
            [group.rows for group in groups] if are_listed else [],
        )
        # where pieces that were captured beforehand end, whoever is in the step
        self._run_rows(rounds, layers | self._warm_up.stops, early, places, clock)
        if chunks:
            looked = layers if early is None else {*layers, *early.layers}
            scored = {layer for part in targets for layer in part.plan.rows_at}
            scored |= {layer for part in exit_targets for layer in part.layers}

            def keep(layer: int, flight: Flight) -> None:
                for part in targets:
                    part.keep(layer, flight)
                for own in exit_targets:
                    own.keep(layer, flight)

            self._chunks.run(batch, chunks, looked, places, scored, keep)
        batch_size = rounds.batch_size if rounds.items else self._pieces.size(len(rows) or 1)
        chosen = plain if early is None else [*plain, *early.wishing]
        edits = self._edits.send(turn, edits_of(chosen, places))
        if edits.num_edits:
            self._pieces.note_latest(batch_size)
        if plain:
            wishes = head_wishes(plain, edits)
            self._pieces.choose(groups, batch_size, are_listed, wishes)
        choices = [self._choose_looking(part, places) for part in slices]
        if early is not None:
            choices.append(self._exit_steps.choose(early, turn, places, num_ends, edits))
        self._memory.fetch(turn, are_told=any(map(lists_best, chosen)))
        coming = ComingStep(
            [*([self._plain_choices(plain, places)] if plain else []), *choices],
            [
                *(self._chooser.score(part) for part in targets),
                *(part.score() for part in exit_targets),
            ],
            {
                row.sequence: places[row.item, row.position]
                for row in rows
                if not row.sequence.request.continuation
            },
            {} if early is None else self._exit_steps.leaving(early, places),
            waiting_again(chunks),
            not _has_drafts(batch) and not any(map(_branches, rows)),
            lambda: self._drafter.drafts(rounds, places, turn),
        )
        clock.mark()
        return LaunchedStep(batch, coming, clock, self._device)

    def warm_up(self, mode: DecodingMode, depth: int, sampling: Sequence[SamplingParams]) -> None:
        """Run every piece of steps in one mode once; see ``WarmUp``."""
        self._warm_up.run(mode, depth, sampling)

    def _by_kind(self, rows: Sequence[LogitRow]) -> tuple[list[LogitRow], list[LogitRow]]:
        """The rows whose tokens are chosen in pieces by heads that are known, and by others."""
        early = [row for row in rows if isinstance(row.mode, EarlyExit)]
        known = [row for row in rows if not isinstance(row.mode, EarlyExit)]
        are_plain = list(map(self._is_plain, known))
        plain = list(compress(known, are_plain))
        if (
            len(self._plan(plain).groups) > MAX_GROUPS
            or num_edits_at_most([*plain, *early]) > self._edits.most
        ):
            return [], known
        return plain, [row for row, own in zip(known, are_plain, strict=True) if not own]

    def _is_plain(self, row: LogitRow) -> bool:
        return isinstance(row.mode, PLAIN) and self._chooser.is_direct(row, fused=True)

    def _knows_enough(self, rows: Sequence[LogitRow]) -> bool:
        """Whether no row depends on unknown tokens but by their number, which pieces count."""
        needing = [row for row in rows if row.needs_drafts]
        if not needing:
            return True
        plain, _ = self._by_kind(rows)
        are_in_pieces = set(map(id, [*plain, *self._exit_steps.chosen_in_pieces(rows)]))
        return all(row.counts_drafts and id(row) in are_in_pieces for row in needing)

    def _plan(self, rows: Sequence[LogitRow]) -> ExitPlan:
        return self._planner.plan([row.mode for row in rows])

    def _rounds(self, batch: ScheduledBatch) -> tuple[Rounds, int]:
        """The rows of a step that get one token each, and how many chunks come to their ends."""
        items = list(enumerate(batch.scheduled))
        num_ends = sum(i.reaches_end and not _is_one_token(i) for i in batch.scheduled)
        steady = [pair for pair in items if _is_one_token(pair[1])]
        room = self._memory.spare_row - num_ends
        return Rounds.of(steady, self._pieces.size, room), num_ends

    def _run_rows(
        self,
        rounds: Rounds,
        layers: Collection[int],
        early: ExitStep | None,
        places: Mapping[Place, int],
        clock: StepClock,
    ) -> None:
        """Run the rows of all rounds that there are."""

        def draft() -> None:
            if len(rounds.sizes) > 1:
                self._drafter.draft(rounds, layers, places, 1)
            clock.mark()

        if early is not None and early.has_stream:
            self._exit_steps.run(early, layers, draft)
            return
        if early is not None:
            self._exit_steps.begin()
        if len(rounds.sizes) > 1:
            self._drafter.run(rounds, layers, places, clock.mark)
            return
        clock.mark()
        if rounds.items:
            depths = [item.sequence.request.depth for _, item in rounds.items]
            segments = plan_segments(depths, {at for at in layers if at <= depths[0]})
            self._pieces.run_layers(segments, rounds.num_keys, rounds.batch_size)

    def _choose_looking(self, part: LogitSlice, places: Mapping[Place, int]) -> Coming[Choice]:
        """Choose tokens of rows whose distributions are looked at, and leave them in memory."""
        for layer in part.plan.rows_at:
            part.keep(layer, StateRows(self._pieces.states(layer), places))
        coming = self._chooser.choose(part)
        if coming.tokens is not None:
            own = [places[row.item, row.position] for row in coming.rows]
            self._memory.put("tokens", own, coming.tokens)
        return coming

    def _plain_choices(
        self, plain: Sequence[LogitRow], places: Mapping[Place, int]
    ) -> Coming[Choice]:
        turn, rows = self._turn, [places[row.item, row.position] for row in plain]

        def read(output: StepOutput) -> list[tuple[LogitRow, Choice]]:
            tokens, logprobs, counts = self._memory.found(turn, rows)
            output.note_candidates(counts)
            told = self._memory.told(turn, rows) if any(map(lists_best, plain)) else ()
            return direct_choices(plain, tokens, logprobs, told)

        return Coming(plain, None, read)


def most_keys(model: ModelConfig, config: EngineConfig) -> NumKeys:
    """The longest sequence and the longest source."""
    return NumKeys(
        config.max_model_len, 0 if model.encoder is None else model.encoder.max_source_len
    )


def _has_drafts(batch: ScheduledBatch) -> bool:
    return any(item.num_drafts for item in batch.scheduled)


def _is_one_token(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1 and item.reaches_end


def _branches(row: LogitRow) -> bool:
    """Whether more than one sequence may go on from a row."""
    request = row.sequence.request
    return request.is_beam_search or (request.sampling.n > 1 and row.num_output_tokens == 0)


def _places_of_chunks(chunks: Items, first: int) -> dict[Place, int]:
    """Rows for the last positions of chunks with the ends of their sequences, one by one."""
    ending = [(index, item.stop - 1) for index, item in chunks if item.reaches_end]
    return {place: row for row, place in enumerate(ending, first)}


def _groups_in_memory(
    plan: ExitPlan, plain: Sequence[LogitRow], places: Mapping[Place, int], rounds: Rounds
) -> tuple[list[HeadGroup], bool]:
    """Groups of rows of the memory, and whether it lists them, not being its first rows alike."""
    own = [places[row.item, row.position] for row in plain]
    if len(plan.groups) == 1:
        are_all_that_run = len(own) == sum(rounds.counts) and max(own) < rounds.num_rows
        # with the padding between and behind rounds
        count = rounds.num_rows if are_all_that_run else len(own)
        if are_all_that_run or sorted(own) == list(range(count)):
            return [replace(plan.groups[0], rows=tuple(range(count)))], False
    return [replace(g, rows=tuple(own[row] for row in g.rows)) for g in plan.groups], True
