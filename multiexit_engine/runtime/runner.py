"""Runs one scheduled step: layers in segments, heads at the taps, tokens out.

The one place that joins models and decoding. Knows nothing of queues, blocks' owners or texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from multiexit_engine.batch import CheckedDrafts, ScheduledBatch, ScheduledSequence, StepOutput
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.plan import ExitPlanner, plan_segments, target_mode
from multiexit_engine.decoding.speculation import DraftPolicy
from multiexit_engine.errors import RequestFailed
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.request import ChosenToken
from multiexit_engine.runtime.choosing import Choice, LogitRow, LogitSlice, TokenChooser
from multiexit_engine.runtime.drafting import Drafter, Drafts
from multiexit_engine.runtime.flight import Flight
from multiexit_engine.runtime.step_clock import StepClock


class ModelRunner:
    """Computes scheduled batches on one model and one KV cache.

    Attributes:
        draft_policy: is told what steps and drafts take.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        config: EngineConfig,
        draft_policy: DraftPolicy,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.config = config
        self.draft_policy = draft_policy
        self._states = ExitStates(
            config.num_kv_blocks,
            config.block_size,
            model.config.hidden_size,
            config.device,
        )
        self._chooser = TokenChooser(model.heads, ExitPlanner(model.config), config.device)
        self._drafter = Drafter(model, kv_cache, self._states, self._chooser)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step: write keys and values, choose tokens, score prompt tokens."""
        clock = StepClock(self.config.device)
        self._copy_blocks(batch)
        drafts = Drafts({index: [] for index, item in _items(batch) if item.num_drafts})
        choices = self._chooser.slices(_choice_rows(batch, drafts))
        targets = self._chooser.scored_slices(_target_rows(batch))
        self._run_layers(batch, [*choices, *targets], drafts, clock)
        output = StepOutput()
        if not all(part.is_direct for part in choices):
            # penalties and bans look at the drafts
            drafts.fetch()
        chosen = [pair for part in choices for pair in self._chooser.choose(part, output)]
        drafts.fetch()
        _hand_out(chosen, drafts, output)
        for part in targets:
            self._chooser.score(part, output)
        clock.mark()
        self._record_times(batch, clock)
        return output

    @torch.inference_mode()
    def prompt_scores(self, batch: ScheduledBatch) -> Tensor:
        """[tokens, vocab] float32 raw scores of every computed position, in its request's mode."""
        self._copy_blocks(batch)
        parts = self._chooser.scored_slices(_all_rows(batch))
        self._run_layers(batch, parts, Drafts({}), StepClock(self.config.device))
        results = [self._chooser.scores(part) for part in parts]
        for _, failures in results:
            for message in failures.values():
                raise RequestFailed(message)
        return torch.cat([scores for scores, _ in results])

    def _copy_blocks(self, batch: ScheduledBatch) -> None:
        self.kv_cache.copy_blocks(batch.block_copies)
        self._states.copy_blocks(batch.block_copies)

    def _run_layers(
        self,
        batch: ScheduledBatch,
        slices: Sequence[LogitSlice],
        drafts: Drafts,
        clock: StepClock,
    ) -> None:
        tap_layers = {layer for part in slices for layer in part.plan.rows_at}

        def keep(layer: int, flight: Flight) -> None:
            for part in slices:
                part.keep(layer, flight)

        drafted = {index: item for index, item in _items(batch) if item.num_drafts}
        if drafted:
            self._drafter.draft(drafted, drafts, tap_layers, keep)
        clock.mark()
        flight = Flight(
            self.model,
            self.kv_cache,
            self._states,
            {index: _first_rows(item) for index, item in _items(batch)},
            drafts.joining,
            drafts.last,
        )
        depths = [item.sequence.request.depth for item in batch.scheduled]
        for segment in plan_segments(depths, tap_layers | drafts.joining_layers):
            flight.narrow(segment.num_seqs)
            flight.run(segment.start, segment.stop)
            keep(segment.stop, flight)
            flight.join(segment.stop)

    def _record_times(self, batch: ScheduledBatch, clock: StepClock) -> None:
        """Tell the draft policy of a step in which every sequence got its next tokens."""
        if any(item.num_tokens > 1 for item in batch.scheduled):
            return
        drafting, rest = clock.seconds()
        lengths = [item.num_drafts for item in batch.scheduled]
        if not any(lengths):
            self.draft_policy.plain.add(len(lengths), rest)
            return
        # rounds of fewer sequences cost about as much as the first one: they read the same weights
        self.draft_policy.drafts.add(sum(map(bool, lengths)), drafting / max(lengths))
        self.draft_policy.checks.add(batch.num_tokens, rest)


def _items(batch: ScheduledBatch) -> Iterable[tuple[int, ScheduledSequence]]:
    return enumerate(batch.scheduled)


def _first_rows(item: ScheduledSequence) -> ScheduledSequence:
    """The rows of an item that begin at layer 0 with the step: of a drafted one the last draft."""
    if not item.num_drafts:
        return item
    return ScheduledSequence(item.sequence, item.stop - 1 + item.num_drafts, 1)


def _choice_rows(batch: ScheduledBatch, drafts: Drafts) -> list[LogitRow]:
    rows = []
    for index, item in _items(batch):
        sequence = item.sequence
        if not item.reaches_end or sequence.request.score_from is not None:
            continue
        mode = target_mode(sequence.request.decoding)
        known = drafts.known.get(index, [])
        rows += [
            LogitRow(index, item.stop - 1 + count, sequence, mode, count, known)
            for count in range(1 + item.num_drafts)
        ]
    return rows


def _target_rows(batch: ScheduledBatch) -> list[LogitRow]:
    rows = []
    for index, item in _items(batch):
        request = item.sequence.request
        first = request.first_position_with_logprobs
        if first is None:
            continue
        mode = target_mode(request.decoding)
        next_wanted = first + len(request.scored)
        prompt = request.prompt_token_ids
        places = range(max(next_wanted, item.start + 1), min(item.stop + 1, len(prompt)))
        rows += [
            LogitRow(index, place - 1, item.sequence, mode, target=prompt[place])
            for place in places
        ]
    return rows


def _all_rows(batch: ScheduledBatch) -> list[LogitRow]:
    return [
        LogitRow(index, position, item.sequence, target_mode(item.sequence.request.decoding))
        for index, item in _items(batch)
        for position in range(item.start, item.stop)
    ]


def _hand_out(
    chosen: Sequence[tuple[LogitRow, Choice]], drafts: Drafts, output: StepOutput
) -> None:
    """Give each sequence what its rows gave: of a drafted one what its drafts were right about."""
    checks: dict[int, dict[int, Choice]] = {index: {} for index in drafts.known}
    sequences = {}
    for row, choice in chosen:
        if row.item in checks:
            checks[row.item][row.num_drafts] = choice
            sequences[row.item] = row.sequence
        elif isinstance(choice, str):
            output.failures[row.sequence.request.request_id] = choice
        else:
            output.tokens.append((row.sequence, choice))
    for index, choices in checks.items():
        tokens = _accepted([choices[count] for count in sorted(choices)], drafts.known[index])
        if isinstance(tokens, str):
            output.failures[sequences[index].request.request_id] = tokens
        else:
            checked = CheckedDrafts(tokens, len(drafts.known[index]))
            output.checked.append((sequences[index], checked))


def _accepted(choices: Sequence[Choice], drafts: Sequence[int]) -> list[ChosenToken] | str:
    """The target's tokens up to and with the first that is not the draft at its place."""
    tokens: list[ChosenToken] = []
    for choice, draft in zip(choices, [*drafts, None], strict=True):
        if isinstance(choice, str):
            return choice
        tokens += choice
        if choice[0].token_id != draft:
            break
    return tokens
