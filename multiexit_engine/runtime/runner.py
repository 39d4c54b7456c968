"""Runs one scheduled step: layers in segments, heads at the taps, tokens out.

The one place that joins models and decoding. Knows nothing of queues, blocks' owners or texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence, StepOutput
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.depth_policy import DepthPolicy
from multiexit_engine.decoding.plan import ExitPlanner, plan_segments
from multiexit_engine.errors import RequestFailed
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.params import DecodingMode, EarlyExit, SamplingParams
from multiexit_engine.runtime.device.graph_parts import new_capture
from multiexit_engine.runtime.device.graphs import Eager, Graphs, Pieces
from multiexit_engine.runtime.device.step_clock import StepClock
from multiexit_engine.runtime.drafts.drafting import Drafter, Drafts
from multiexit_engine.runtime.early_exit.early_exits import EarlyExits, EarlyRows
from multiexit_engine.runtime.early_exit.exit_readings import ExitReadings, read_exits
from multiexit_engine.runtime.launched.decode_steps import DecodeSteps, most_keys
from multiexit_engine.runtime.launched.launched_step import LaunchedStep
from multiexit_engine.runtime.rows.alternatives import (
    alternative_rows,
    slots_of_accepted,
    with_alternatives,
)
from multiexit_engine.runtime.rows.choosing import TokenChooser
from multiexit_engine.runtime.rows.flight import Flight
from multiexit_engine.runtime.rows.handing_out import hand_out, hand_out_scores
from multiexit_engine.runtime.rows.logit_rows import LogitRow, all_rows, choice_rows, target_rows
from multiexit_engine.runtime.rows.logit_slices import LogitSlice
from multiexit_engine.runtime.scheduling.draft_lengths import DraftLengths
from multiexit_engine.runtime.sources import read_sources
from multiexit_engine.transfer import to_device, wait_for


class ModelRunner:
    """Computes scheduled batches on one model and one KV cache.

    Attributes:
        draft_lengths: is told what steps and drafts take.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        config: EngineConfig,
        draft_lengths: DraftLengths,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.config = config
        self.draft_lengths = draft_lengths
        self._states = ExitStates(
            # and the block that nobody owns, where padding writes
            config.num_kv_blocks + 1,
            config.block_size,
            model.config.hidden_size,
            config.device,
        )
        self._chooser = TokenChooser(model.heads, ExitPlanner(model.config), config.device)
        self._decode = _decode_steps(model, kv_cache, self._states, self._chooser, config)
        self._drafter = Drafter(model, kv_cache, self._states, self._chooser)
        self._early_exits = EarlyExits(model, self._chooser, _depth_policy(model, config))

    def launch(
        self, batch: ScheduledBatch, before: LaunchedStep | None = None
    ) -> LaunchedStep | None:
        """Start a step and come back at once; None, and nothing done, where the host is needed.

        Args:
            batch: the step. It may count on tokens that are not known yet.
            before: the step that is choosing these; it has not been waited for.
        """
        if self._decode is None:
            return None
        with torch.inference_mode():
            rows = self._decode.plan(batch, before)
            if rows is None:
                return None
            self._prepare_blocks(batch)
            return self._decode.launch(batch, rows, before)

    @torch.inference_mode()
    def warm_up(self, mode: DecodingMode, depth: int, sampling: Sequence[SamplingParams]) -> None:
        """Capture what steps in a mode will replay that runs so many layers."""
        assert self._decode is not None, "nothing is captured on a CPU"
        self._decode.warm_up(mode, depth, sampling)

    def finish(self, step: LaunchedStep) -> StepOutput:
        """Wait for a launched step."""
        output = step.wait()
        self.draft_lengths.record(step.batch, step.clock.seconds(), output)
        return output

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step: write keys and values, choose tokens, score prompt tokens."""
        launched = self.launch(batch)
        return self.finish(launched) if launched is not None else self._run(batch)

    @torch.inference_mode()
    def _run(self, batch: ScheduledBatch) -> StepOutput:
        clock = StepClock(self.config.device)
        self._prepare_blocks(batch)
        scheduled, (batch, alternatives) = batch, with_alternatives(batch)
        drafted = [index for index, item in _items(batch) if item.num_drafts]
        drafts = Drafts({index: [] for index in [*drafted, *alternatives]}, alternatives)
        choosing, scored = choice_rows(_items(batch), drafts.known), target_rows(_items(batch))
        choosing += alternative_rows(batch.scheduled, alternatives, drafts.known)
        early = self._early_exits.rows([*choosing, *scored], batch)
        choices = self._chooser.slices(_with_fixed_heads(choosing))
        targets = self._chooser.scored_slices(_with_fixed_heads(scored))
        self._run_layers(batch, [*choices, *targets], early, drafts, clock)
        choices = self._chooser.joined([*choices, *early.choices()])
        targets += early.targets()
        output = StepOutput(waiting=early.waiting, held=early.held)
        if any(part.needs_drafts for part in choices):
            # penalties and bans look at the drafts
            drafts.fetch()
        drafts.send()
        coming = [self._chooser.choose(part) for part in choices]
        coming_scores = [self._chooser.score(part) for part in targets]
        wait_for(self.config.device)
        drafts.read()
        chosen = [pair for part in coming for pair in part.read(output)]
        hand_out([*chosen, *early.chosen], drafts.known, output, alternatives)
        self._move_alternatives(scheduled, output)
        hand_out_scores([pair for part in coming_scores for pair in part.read(output)], output)
        clock.mark()
        seconds = clock.seconds()
        early.note_step(sum(seconds))
        self.draft_lengths.record(scheduled, seconds, output)
        return output

    @torch.inference_mode()
    def prompt_scores(self, batch: ScheduledBatch) -> Tensor:
        """[tokens, vocab] float32 raw scores of every position of one request, in its mode."""
        self._prepare_blocks(batch)
        rows = all_rows(_items(batch))
        early = self._early_exits.rows(rows, batch)
        parts = self._chooser.scored_slices(_with_fixed_heads(rows))
        self._run_layers(batch, parts, early, Drafts({}), StepClock(self.config.device))
        parts += early.targets()
        results = [self._chooser.scores(part) for part in parts]
        for _, failures in results:
            for message in failures.values():
                raise RequestFailed(message)
        scores = torch.cat([scores for scores, _ in results])
        places = torch.tensor([row.position for part in parts for row in part.rows])
        return scores[to_device(places.argsort(), scores.device)]

    @torch.inference_mode()
    def exit_readings(self, batch: ScheduledBatch) -> ExitReadings:
        """What the exits of a request's mode measure at its positions; see ``read_exits``."""
        self._prepare_blocks(batch)
        return read_exits(self.model, self.kv_cache, self._states, batch)

    def _prepare_blocks(self, batch: ScheduledBatch) -> None:
        """Copy the blocks that are to be written, and fill those of sources."""
        self.kv_cache.copy_blocks(batch.block_copies)
        self._states.copy_blocks(batch.block_copies)
        if batch.unread:
            read_sources(self.model, self.kv_cache, batch.unread)

    def _move_alternatives(self, batch: ScheduledBatch, output: StepOutput) -> None:
        """Put keys and values of accepted alternatives where those of the drafts lie."""
        slots = slots_of_accepted(batch.scheduled, output, self.config.block_size)
        self.kv_cache.by_token.copy_blocks(slots)

    def _run_layers(
        self,
        batch: ScheduledBatch,
        slices: Sequence[LogitSlice],
        early: EarlyRows,
        drafts: Drafts,
        clock: StepClock,
    ) -> None:
        tap_layers = {layer for part in slices for layer in part.plan.rows_at}

        def keep(layer: int, flight: Flight) -> None:
            for part in slices:
                part.keep(layer, flight)

        drafted = {index: item for index, item in _items(batch) if item.num_drafts}
        rounds = self._drafter.draft(drafted, drafts, tap_layers, keep) if drafted else []
        # of a step in which all sequences draft together, in the order in which they go on
        built = rounds[0] if len(rounds) == 1 and rounds[0].is_of(batch.scheduled) else None
        clock.mark()
        flight = Flight(
            self.model,
            self.kv_cache,
            self._states,
            {index: _first_rows(item) for index, item in _items(batch)},
            drafts.joining | early.joining,
            drafts.last if built is None else None,
            None if built is None else built.last(drafts.last_tokens),
            early.entering,
            None if built is None else built.together,
        )
        depths = [item.sequence.request.depth for item in batch.scheduled]
        for segment in plan_segments(depths, tap_layers | drafts.joining_layers | early.layers):
            flight.narrow(segment.num_seqs)
            if flight.is_over:
                break
            early.run(segment.start, segment.stop, flight)
            keep(segment.stop, flight)
            early.look(segment.stop, flight)
            flight.join(segment.stop)


def _depth_policy(model: MultiExitModel, config: EngineConfig) -> DepthPolicy | None:
    """What regroups rows by depth; None on a device, whose times the host does not see."""
    return DepthPolicy(model.config.num_layers) if config.device.type == "cpu" else None


def _decode_steps(
    model: MultiExitModel,
    kv_cache: PagedKVCache,
    states: ExitStates,
    chooser: TokenChooser,
    config: EngineConfig,
) -> DecodeSteps | None:
    """What launches whole steps; None on a CPU, which never waits."""
    if config.device.type == "cpu":
        return None
    pieces: Pieces = Eager()
    if config.cuda_graphs:
        capture = new_capture(config)
        pieces = Graphs(config.cuda_graphs, max(most_keys(model.config, config)), capture)
    return DecodeSteps(model, kv_cache, states, chooser, config, pieces)


def _items(batch: ScheduledBatch) -> Iterable[tuple[int, ScheduledSequence]]:
    return enumerate(batch.scheduled)


def _first_rows(item: ScheduledSequence) -> ScheduledSequence:
    """The rows of an item that begin at layer 0 with the step: of a drafted one the last draft."""
    if not item.num_drafts:
        return item
    return ScheduledSequence(item.sequence, item.stop - 1 + item.num_drafts, 1)


def _with_fixed_heads(rows: Sequence[LogitRow]) -> list[LogitRow]:
    """The rows whose heads are known before the step runs."""
    return [row for row in rows if not isinstance(row.mode, EarlyExit)]
