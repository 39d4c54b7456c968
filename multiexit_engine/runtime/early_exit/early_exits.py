"""Rows that choose their exit on the way up: who is measured where, who leaves, who waits then.

Follows the flight of a step. Knows nothing of how a measure is computed, of how a token is chosen,
or of the layers between exits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import TypeAlias

from torch import Tensor

from multiexit_engine.batch import ScheduledBatch
from multiexit_engine.decoding.depth_policy import MOST_STEPS, Crossroads, DepthPolicy
from multiexit_engine.decoding.gates import similarity
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.modes import EarlyExit, Exit, Original
from multiexit_engine.request import ChosenToken, Held, Joining
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.runtime.early_exit.deciding_rows import DecidingRow
from multiexit_engine.runtime.early_exit.exit_gates import HeadGate
from multiexit_engine.runtime.rows.choosing import TokenChooser
from multiexit_engine.runtime.rows.chosen_rows import Choice
from multiexit_engine.runtime.rows.flight import Flight
from multiexit_engine.runtime.rows.logit_rows import LogitRow
from multiexit_engine.runtime.rows.logit_slices import LogitSlice

# more rows than this are prompts, which never wait
MOST_TIMED_ROWS = 256
# of each layer the rows that decided there, and their states
_Decided: TypeAlias = dict[int, tuple[list[LogitRow], Tensor]]


class EarlyExits:
    """Starts the rows of each step on one model.

    Args:
        model: runs them.
        chooser: of their tokens.
        policy: says which of them wait for others; None where none ever does.
    """

    def __init__(
        self, model: MultiExitModel, chooser: TokenChooser, policy: DepthPolicy | None
    ) -> None:
        self.heads = model.heads
        self.policy = policy
        self.chooser = chooser
        self.num_layers = model.config.num_layers
        self._config = model.config
        self._layers: dict[EarlyExit, frozenset[int]] = {}
        # the same objects every time, by which plans of heads are found again
        self.modes: dict[int, Original | Exit] = {
            layer: Exit(layer) for layer in model.config.exit_layers
        }
        self.modes[self.num_layers] = Original()

    def layers_of(self, mode: EarlyExit) -> frozenset[int]:
        """The layers at which rows of a mode are measured."""
        if mode not in self._layers:
            exits = resolve_mode(mode, self._config).exits
            self._layers[mode] = frozenset(head.layer for head in exits)
        return self._layers[mode]

    def rows(self, rows: Iterable[LogitRow], batch: ScheduledBatch) -> EarlyRows:
        """Those of a step's rows that choose their exit, or chose it before, on their way."""
        deciding = [row for row in rows if isinstance(row.mode, EarlyExit)]
        return EarlyRows(self, deciding, batch)


class EarlyRows:
    """The rows of one step that choose their exit.

    Args:
        exits: of the model.
        rows: that choose.
        batch: the step. Items of it whose rows are computed again leave where they left at first.

    Attributes:
        joining: for each item its earlier tokens that wait.
        chosen: rows whose token the measure itself told.
        waiting: the sequences that left, and which of their tokens lack layers now.
        held: those of them whose last row goes on in a later step.
        entering: items whose last row was held before, and the layer above which it goes on.
    """

    def __init__(self, exits: EarlyExits, rows: Sequence[LogitRow], batch: ScheduledBatch) -> None:
        self._exits = exits
        self._batch = batch
        left_at = {index: item.left_at for index, item in enumerate(batch.scheduled)}
        self._returning = {index: at for index, at in left_at.items() if at is not None}
        self.joining = {
            index: item.sequence.waiting
            for index, item in enumerate(batch.scheduled)
            if item.sequence.waiting
        }
        self._undecided: list[DecidingRow] = []
        self._kept: dict[int, list[DecidingRow]] = {}
        self.entering: dict[int, int] = {}
        for row in rows:
            assert isinstance(row.mode, EarlyExit), "only these decide"
            deciding = DecidingRow.of(row, exits.layers_of(row.mode))
            if (held := row.sequence.held) is None:
                self._undecided.append(deciding)
            else:
                self._kept.setdefault(held.layer, []).append(deciding)
                self.entering[row.item] = held.layer
        self._all = [*self._undecided, *(row for kept in self._kept.values() for row in kept)]
        self._seconds_in_layers = 0.0
        self._compared: list[DecidingRow] = []
        self._states: Tensor | None = None
        self._riding: list[int] = []
        self._choosing: _Decided = {}
        self._scored: _Decided = {}
        self.chosen: list[tuple[LogitRow, Choice]] = []
        self.waiting: dict[TokenSequence, tuple[Joining, ...]] = {}
        self.held: dict[TokenSequence, Held] = {}

    @property
    def layers(self) -> set[int]:
        """Where these rows are looked at."""
        measured = {layer for row in self._all for layer in row.layers}
        compared = {
            layer - 1 for row in self._all for layer in row.layers if row.compares_at(layer - 1)
        }
        joined = {entry.layer for entries in self.joining.values() for entry in entries}
        return measured | compared | joined | set(self._returning.values())

    def choices(self) -> list[LogitSlice]:
        """Slices of the rows that decided, whose tokens are still to be chosen."""
        return _filled(self._exits.chooser.slices(_rows_of(self._choosing)), self._choosing)

    def targets(self) -> list[LogitSlice]:
        """Slices of the rows that decided, whose tokens are still to be scored."""
        return _filled(self._exits.chooser.scored_slices(_rows_of(self._scored)), self._scored)

    def run(self, start: int, stop: int, flight: Flight) -> None:
        """Run layers on the rows that are here, and tell the policy what that took."""
        started = perf_counter()
        flight.run(start, stop)
        is_timed = self._all and start < stop and 0 < flight.num_rows <= MOST_TIMED_ROWS
        if self._exits.policy is not None and is_timed:
            seconds = perf_counter() - started
            self._seconds_in_layers += seconds
            self._exits.policy.note_span(start, stop, flight.num_rows, seconds)

    def note_step(self, seconds: float) -> None:
        """Tell the policy what the step took in all."""
        if self._exits.policy is not None and len(self._all) == self._batch.num_tokens:
            self._exits.policy.note_rest(len(self._all), seconds - self._seconds_in_layers)

    def look(self, layer: int, flight: Flight) -> None:
        """Measure the rows that have come to a layer; those that pass decide, and may leave."""
        if not self._all and not self._returning:
            return
        if layer == self._exits.num_layers:
            self._decide(self._undecided, layer, flight)
            return
        again = [item for item, left_at in self._returning.items() if left_at == layer]
        self._leave_waiting(again, layer, flight)
        if here := [row for row in self._undecided if layer in row.layers]:
            self._measure(here, layer, flight)
            leaving = [row for row in here if row.is_sure]
            if self._exits.policy is not None:
                self._exits.policy.note_exit(layer, len(here), len(here) - len(leaving))
            self._decide(leaving, layer, flight)
        come_in = self._hold_or_let_go(layer, flight)
        self._compared = [row for row in self._undecided if row.compares_at(layer)]
        self._states = _states(self._compared, flight) if self._compared else None
        if not come_in:
            self._leave_unless_others_go_on(layer, flight)

    def _hold_or_let_go(self, layer: int, flight: Flight) -> bool:
        """Let the rows that want to go deeper wait together, or go; whether some come in to go."""
        kept = self._kept.pop(layer, [])
        here = [row for row in self._undecided if row.may_wait_at(layer)]
        if not kept and not here:
            return False
        if not self._holds(layer, kept, here, flight):
            self._undecided += kept
            return bool(kept)
        self.held |= {row.row.sequence: row.held_at(layer) for row in (*kept, *here)}
        self.waiting |= {row.row.sequence: row.row.sequence.waiting for row in kept}
        flight.dismiss([row.row.item for row in kept])
        self._undecided = [row for row in self._undecided if row not in here]
        self._leave_waiting([row.row.item for row in here], layer, flight)
        return False

    def _holds(
        self, layer: int, kept: list[DecidingRow], here: list[DecidingRow], flight: Flight
    ) -> bool:
        policy, wanting = self._exits.policy, [*kept, *here]
        if policy is None or any(row.held_at(layer).num_steps > MOST_STEPS for row in kept):
            return False
        still_kept = sum(map(len, self._kept.values()))
        num_busy = len(self._undecided) + len(kept) + still_kept + len(self.held)
        own = {row.row.item for row in here}
        return policy.holds(
            Crossroads(
                layer,
                tuple(sorted({layer for row in self._all for layer in row.layers})),
                num_held=len(wanting),
                num_coming=len(self._all) - num_busy,
                num_others=flight.num_rows_beyond(layer, own.union(self._riding)),
                weight=sum(self._num_rows_of(row, layer, flight) for row in wanting) / len(wanting),
            )
        )

    def _num_rows_of(self, row: DecidingRow, layer: int, flight: Flight) -> int:
        """The rows that go through the layers above with one."""
        if row.row.sequence.request.copies_kv:
            return 1
        starts = [e.start for e in self.joining.get(row.row.item, ()) if e.layer == layer]
        return row.row.position + 1 - min([*starts, flight.first_position(row.row.item)])

    def _measure(self, rows: Sequence[DecidingRow], layer: int, flight: Flight) -> None:
        self._compare([row for row in rows if row.mode.measure == "similarity"], flight)
        self._ask_probes([row for row in rows if row.mode.measure == "probe"], layer, flight)
        if readers := [row for row in rows if row.mode.measure not in ("similarity", "probe")]:
            states = lambda some: _states(some, flight)  # noqa: E731
            HeadGate(self._exits.heads, layer, states).ask(readers)

    def _compare(self, rows: Sequence[DecidingRow], flight: Flight) -> None:
        if not rows:
            return
        assert self._states is not None, "these rows were looked at one layer below"
        places = [self._compared.index(row) for row in rows]
        values = similarity(self._states[places], _states(rows, flight)).tolist()
        for row, value in zip(rows, values, strict=True):
            row.note(value)

    def _ask_probes(self, rows: Sequence[DecidingRow], layer: int, flight: Flight) -> None:
        if not rows:
            return
        heads = self._exits.heads
        values = heads.probes.chances(layer, heads.normed(_states(rows, flight))).tolist()
        for row, value in zip(rows, values, strict=True):
            row.note(value)

    def _decide(self, rows: Sequence[DecidingRow], layer: int, flight: Flight) -> None:
        """Let rows take the head of a layer."""
        if not rows:
            return
        chooser, mode = self._exits.chooser, self._exits.modes[layer]
        choosing: list[DecidingRow] = []
        scored: list[DecidingRow] = []
        for row in rows:
            row.row = row.row.decided(mode, row.value)
            if row.row.target is not None:
                scored.append(row)
            elif layer in row.layers and row.token is not None and chooser.takes_best(row.row):
                self.chosen.append((row.row, [ChosenToken(row.token)]))
            else:
                choosing.append(row)
        for kept, own in ((self._choosing, choosing), (self._scored, scored)):
            if own:
                kept[layer] = [row.row for row in own], _states(own, flight)
        gone = set(map(id, rows))
        self._undecided = [row for row in self._undecided if id(row) not in gone]
        if layer < self._exits.num_layers:
            self._leave_or_ride([row.row for row in rows if row.may_leave], layer, flight)

    def _leave_or_ride(self, rows: Sequence[LogitRow], layer: int, flight: Flight) -> None:
        """Take decided rows out, or let them run on with others that need the layers above.

        What they skip now they would run through later, together with a row that goes deeper. So
        where the layers are read anyway, a row that no earlier one waits with loses nothing by
        going on, and the step keeps its number of rows. Its token is chosen already, and the keys
        and values are the same. Not so where they are copied.
        """
        for row in rows:
            request = row.sequence.request
            if not row.sequence.waiting and not request.copies_kv:
                self._riding.append(row.item)
        self._leave_waiting(
            [row.item for row in rows if row.item not in self._riding], layer, flight
        )

    def _leave_unless_others_go_on(self, layer: int, flight: Flight) -> None:
        here = set(flight.going_beyond(layer))
        if self._riding and here == set(self._riding):
            self._leave_waiting(self._riding, layer, flight)
            self._riding = []

    def _leave_waiting(self, items: Sequence[int], layer: int, flight: Flight) -> None:
        if not items:
            return
        for item in items:
            entries = self.joining.get(item, ())
            deeper = tuple(entry for entry in entries if entry.layer >= layer)
            if not deeper or deeper[-1].layer > layer:
                deeper = (*deeper, Joining(layer, flight.first_position(item)))
            self.waiting[self._batch.scheduled[item].sequence] = deeper
        flight.keep(items)
        flight.leave(items)


def _rows_of(kept: _Decided) -> list[LogitRow]:
    return [row for rows, _ in kept.values() for row in rows]


def _filled(slices: list[LogitSlice], kept: _Decided) -> list[LogitSlice]:
    for part in slices:
        for layer, (rows, states) in kept.items():
            part.give(layer, rows, states)
    return slices


def _states(rows: Sequence[DecidingRow], flight: Flight) -> Tensor:
    """[rows, hidden]: the states of rows that are in the flight."""
    places = flight.rows_of([(row.row.item, row.row.position) for row in rows])
    return flight.take([place for place in places if place is not None])
