"""Drafts of a step: an early exit guesses the next tokens of sequences, one after the other.

Leaves the states of the drafted rows where the deeper layers find them. Knows nothing of how drafts
are checked, nor of how many pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.batch import ScheduledSequence
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.decoding.draws import Draws
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.params import Exit, SelfSpeculative
from multiexit_engine.request import Joining
from multiexit_engine.runtime.drafts.round_batches import RoundBatches
from multiexit_engine.runtime.rows.alternatives import Alternative
from multiexit_engine.runtime.rows.choosing import TokenChooser
from multiexit_engine.runtime.rows.flight import Flight
from multiexit_engine.runtime.rows.logit_rows import LogitRow
from multiexit_engine.transfer import ToHost, to_device, wait_for

# of a smaller vocabulary's head there is little to save
LEAST_DRAFT_VOCAB = 8192

Keep = Callable[[int, Flight], None]


@dataclass(slots=True)
class Drafts:
    """The drafts of a step.

    Attributes:
        known: for each item with drafts those that are on the host; all of them after ``fetch``.
            For one that is an alternative the tokens up to and with it.
        alternatives: items that are other tokens for the place of a draft.
        joining: for each item the drafted rows, whose states wait at the exit.
    """

    known: dict[int, list[int]]
    alternatives: Mapping[int, Alternative] = field(default_factory=dict)
    joining: dict[int, tuple[Joining, ...]] = field(default_factory=dict)
    _rounds: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _pending: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _coming: ToHost = field(default_factory=lambda: ToHost([]))

    @property
    def joining_layers(self) -> set[int]:
        """The exits at which drafted rows wait."""
        return {entry.layer for entries in self.joining.values() for entry in entries}

    def add(self, items: list[int], tokens: Tensor) -> None:
        """One more draft [items] int64 for each of some items."""
        self._rounds.append((items, tokens))
        self._pending.append((items, tokens))

    @property
    def last(self) -> dict[int, Tensor]:
        """For each item its last draft, [1] int64 on the device."""
        return {
            item: token
            for items, tokens in self._rounds
            for item, token in zip(items, tokens[:, None].unbind(), strict=True)
        }

    @property
    def last_tokens(self) -> Tensor:
        """[items] int64: all of these in the order of the first round, which is of all items."""
        items, tokens = self._rounds[-1]
        is_of_all = len(items) == len(self._rounds[0][0])
        return tokens if is_of_all else torch.cat([*self.last.values()])

    def num_choices(self, number: int) -> int:
        """How many choices for draft ``number``, counted from 0, some item wants."""
        return 1 + max(
            (o.rank for o in self.alternatives.values() if o.number == number), default=0
        )

    def add_choices(self, number: int, items: list[int], choices: Tensor) -> Tensor:
        """Draft ``number`` of some items, and what else is checked at its place.

        Args:
            number: counted from 0.
            items: that draft it.
            choices: [items, ``num_choices``] int64, best first.

        Returns:
            [items] int64: the drafts.
        """
        tokens = choices[:, 0].contiguous()
        self.add(items, tokens)
        rows = {item: row for row, item in enumerate(items)}
        others = {
            item: (rows[other.item], other.rank)
            for item, other in self.alternatives.items()
            if other.number == number and other.item in rows
        }
        if others:
            own, ranks = to_device([*others.values()], choices.device).unbind(1)
            self.add([*others], choices[own, ranks])
        return tokens

    def fetch(self) -> None:
        """Have all drafts on the host; waits for the device."""
        if self._pending:
            self.send()
            wait_for(self._pending[0][1].device)
            self.read()

    def send(self) -> None:
        """Let the drafts come to the host, for ``read`` after a wait."""
        self._coming = ToHost([tokens for _, tokens in self._pending])

    def read(self) -> None:
        """Know the drafts that were sent."""
        for (items, _), tokens in zip(self._pending, self._coming.lists(), strict=True):
            for item, token in zip(items, tokens, strict=True):
                if (other := self.alternatives.get(item)) is not None:
                    self.known[item] += self.known[other.item][: other.number]
                self.known[item].append(token)
        self._pending.clear()


def draft_vocab(mode: SelfSpeculative, vocab_size: int) -> int:
    """Tokens of the vocabulary, the first ones, among which drafts are chosen."""
    if mode.draft_vocab == "auto":
        return min(vocab_size, max(LEAST_DRAFT_VOCAB, vocab_size // 4))
    return min(vocab_size, mode.draft_vocab)


class Drafter:
    """Drafts with the exits of one model."""

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        states: ExitStates,
        chooser: TokenChooser,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._states = states
        self._chooser = chooser
        self._exits: dict[int, Exit] = {}

    def draft(
        self,
        items: Mapping[int, ScheduledSequence],
        drafts: Drafts,
        tap_layers: set[int],
        keep: Keep,
    ) -> list[RoundBatches]:
        """Draft ``num_drafts`` tokens for each item; gives the rounds of those that do so together.

        Afterwards the keys and values below the exit are those of the item's last token and of
        all its drafts but the last one, whose states at the exit are kept.

        Args:
            items: the items that have drafts, by their places in the step.
            drafts: where the drafts go; ``known`` has an empty list for each item.
            tap_layers: layers at which ``keep`` is called.
            keep: takes the states of rows that are needed later.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, item in items.items():
            mode = item.sequence.request.decoding
            assert isinstance(mode, SelfSpeculative), "only these have drafts"
            vocab = draft_vocab(mode, self._model.config.vocab_size)
            groups.setdefault((mode.draft_exit, vocab), []).append(index)
        found = []
        for (layer, vocab), indices in groups.items():
            indices.sort(key=lambda index: -items[index].num_drafts)
            group = _Group(self._exit(layer), vocab, {index: items[index] for index in indices})
            found.append(self._draft_group(group, drafts, tap_layers, keep))
        return found

    def _exit(self, layer: int) -> Exit:
        """The same object each time: plans are found by their modes' ids."""
        return self._exits.setdefault(layer, Exit(layer))

    def _draft_group(
        self, group: _Group, drafts: Drafts, tap_layers: set[int], keep: Keep
    ) -> RoundBatches:
        layer, indices = group.mode.layer, list(group.items)
        stops = sorted({layer, *(stop for stop in tap_layers if stop < layer)})
        cache = self._kv_cache
        rounds = RoundBatches([*group.items.values()], cache.block_size, cache.device)
        tokens = rounds.first_tokens
        picks = self._picks(group, drafts)
        for number in range(rounds.count):
            rows = rounds.rows(number)
            aboard = dict(zip(indices, rows, strict=False))
            forward = rounds.forward(number, tokens[: len(rows)])
            flight = Flight(self._model, cache, self._states, aboard, forward=forward)
            for start, stop in zip([0, *stops], stops, strict=False):
                flight.run(start, stop)
                if stop in tap_layers:
                    keep(stop, flight)
            flight.keep(aboard)
            choices = self._tokens(group, picks, number, flight, drafts)
            tokens = drafts.add_choices(number, list(aboard), choices)
        for index, item in group.items.items():
            drafts.joining[index] = (Joining(layer, item.stop - 1),)
        return rounds

    def _picks(self, group: _Group, drafts: Drafts) -> _Picks:
        rows = group.rows(0, len(group.items), drafts)
        # a draft need not be what the rules of a later place would make of it
        is_direct = [self._chooser.is_direct(row) for row in rows]
        direct = [place for place, own in enumerate(is_direct) if own]
        scored = [place for place, own in enumerate(is_direct) if not own]
        return _Picks(direct, scored, self._chooser.draws([rows[place] for place in direct]))

    def _tokens(
        self, group: _Group, picks: _Picks, number: int, flight: Flight, drafts: Drafts
    ) -> Tensor:
        """[rows, choices] int64 for each row of a round, best first: the draft, and others."""
        count = drafts.num_choices(number)
        direct = [place for place in picks.direct if place < flight.num_rows]
        scored = [place for place in picks.scored if place < flight.num_rows]
        draws = picks.draws.later(number, len(direct))
        if not scored:
            return self._direct(group, flight.hidden, draws, count)
        tokens = to_device([[0] * count] * flight.num_rows, self._kv_cache.device, torch.int64)
        if direct:
            found = self._direct(group, flight.take(direct), draws, count)
            tokens.index_copy_(0, to_device(direct, tokens.device), found)
        rows = group.rows(number, flight.num_rows, drafts)
        places = {rows[place].item: place for place in scored}
        for part in self._chooser.draft_slices([rows[place] for place in scored]):
            part.keep(group.mode.layer, flight)
            if part.needs_drafts:
                # penalties and bans look at the drafts before
                drafts.fetch()
            index = to_device([places[row.item] for row in part.rows], tokens.device)
            tokens.index_copy_(0, index, self._chooser.draft_choices(part, count))
        return tokens

    def _direct(self, group: _Group, hidden: Tensor, draws: Draws, count: int) -> Tensor:
        options = group.mode, hidden, draws, group.vocab
        if count == 1:
            return self._chooser.direct_drafts(*options)[:, None]
        return self._chooser.direct_draft_choices(*options, count)


@dataclass(frozen=True)
class _Group:
    """Items that draft with one exit, by falling number of drafts.

    Attributes:
        mode: the exit.
        vocab: how many tokens those choose from of whom nothing else is wanted.
        items: by their places in the step.
    """

    mode: Exit
    vocab: int
    items: dict[int, ScheduledSequence]

    def rows(self, number: int, count: int, drafts: Drafts) -> list[LogitRow]:
        """The rows that choose the drafts of a round, of the first ``count`` items."""
        return [
            LogitRow(
                index,
                item.stop - 1 + number,
                item.sequence,
                self.mode,
                number,
                drafts.known[index],
            )
            for index, item in islice(self.items.items(), count)
        ]


class _Picks(NamedTuple):
    """How the items of a group choose.

    Attributes:
        direct: places of the items whose drafts nobody needs scores for.
        scored: places of the others.
        draws: of the direct ones, in the first round.
    """

    direct: list[int]
    scored: list[int]
    draws: Draws
