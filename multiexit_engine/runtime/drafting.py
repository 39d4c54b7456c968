"""Drafts of a step: an early exit guesses the next tokens of sequences, one after the other.

Leaves the states of the drafted rows where the deeper layers find them. Knows nothing of how drafts
are checked, nor of how many pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from multiexit_engine.batch import ScheduledSequence
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.params import Exit, SelfSpeculative
from multiexit_engine.request import Joining
from multiexit_engine.runtime.choosing import TokenChooser
from multiexit_engine.runtime.flight import Flight
from multiexit_engine.runtime.logit_rows import LogitRow
from multiexit_engine.transfer import ToHost, wait_for

# of a smaller vocabulary's head there is little to save
LEAST_DRAFT_VOCAB = 8192

Keep = Callable[[int, Flight], None]


@dataclass(slots=True)
class Drafts:
    """The drafts of a step.

    Attributes:
        known: for each item with drafts those that are on the host; all of them after ``fetch``.
        last: for each item its last draft, [1] int64 on the device.
        joining: for each item the drafted rows, whose states wait at the exit.
    """

    known: dict[int, list[int]]
    last: dict[int, Tensor] = field(default_factory=dict)
    joining: dict[int, tuple[Joining, ...]] = field(default_factory=dict)
    _pending: list[tuple[list[int], Tensor]] = field(default_factory=list)
    _coming: ToHost = field(default_factory=lambda: ToHost([]))

    @property
    def joining_layers(self) -> set[int]:
        """The exits at which drafted rows wait."""
        return {entry.layer for entries in self.joining.values() for entry in entries}

    def add(self, items: list[int], tokens: Tensor) -> None:
        """One more draft [items] int64 for each of some items."""
        self._pending.append((items, tokens))
        for place, item in enumerate(items):
            self.last[item] = tokens[place : place + 1]

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

    def draft(
        self,
        items: Mapping[int, ScheduledSequence],
        drafts: Drafts,
        tap_layers: set[int],
        keep: Keep,
    ) -> None:
        """Draft ``num_drafts`` tokens for each item.

        Afterwards the keys and values below the exit are those of the item's last token and of
        all its drafts but the last one, whose states at the exit are kept.

        Args:
            items: the items that have drafts, by their places in the step.
            drafts: where the drafts go; ``known`` has an empty list for each item.
            tap_layers: layers at which ``keep`` is called.
            keep: takes the states of rows that are needed later.
        """
        groups: dict[tuple[Exit, int], list[int]] = {}
        for index, item in items.items():
            mode = item.sequence.request.decoding
            assert isinstance(mode, SelfSpeculative), "only these have drafts"
            way = Exit(mode.draft_exit), draft_vocab(mode, self._model.config.vocab_size)
            groups.setdefault(way, []).append(index)
        for (exit_mode, vocab), group in groups.items():
            group.sort(key=lambda index: -items[index].num_drafts)
            own = {index: items[index] for index in group}
            self._draft_group(exit_mode, vocab, own, drafts, tap_layers, keep)

    def _draft_group(
        self,
        mode: Exit,
        vocab: int,
        items: dict[int, ScheduledSequence],
        drafts: Drafts,
        tap_layers: set[int],
        keep: Keep,
    ) -> None:
        stops = sorted({mode.layer, *(layer for layer in tap_layers if layer < mode.layer)})
        for count in range(max(item.num_drafts for item in items.values())):
            aboard = [index for index, item in items.items() if item.num_drafts > count]
            flight = self._begin(aboard, items, count, drafts)
            for start, stop in zip([0, *stops], stops, strict=False):
                flight.run(start, stop)
                if stop in tap_layers:
                    keep(stop, flight)
            flight.keep(aboard)
            self._add(mode, vocab, aboard, items, count, flight, drafts)
        for index, item in items.items():
            drafts.joining[index] = (Joining(mode.layer, item.stop - 1),)

    def _begin(
        self, aboard: list[int], items: dict[int, ScheduledSequence], count: int, drafts: Drafts
    ) -> Flight:
        rows = {
            index: ScheduledSequence(items[index].sequence, items[index].stop - 1 + count, 1)
            for index in aboard
        }
        tokens = {index: drafts.last[index] for index in aboard} if count else None
        return Flight(self._model, self._kv_cache, self._states, rows, tokens=tokens)

    def _add(
        self,
        mode: Exit,
        vocab: int,
        aboard: list[int],
        items: dict[int, ScheduledSequence],
        count: int,
        flight: Flight,
        drafts: Drafts,
    ) -> None:
        rows = [
            LogitRow(
                index,
                items[index].stop - 1 + count,
                items[index].sequence,
                mode,
                count,
                drafts.known[index],
            )
            for index in aboard
        ]
        for part in self._chooser.draft_slices(rows):
            part.keep(mode.layer, flight)
            if part.needs_drafts:
                # penalties and bans look at the drafts before
                drafts.fetch()
            drafts.add([row.item for row in part.rows], self._chooser.drafts(part, vocab))
