"""Rows whose distributions are made together, and the states that they need.

Knows exit plans and the flight of a step; nothing of how a distribution is made or a token chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from multiexit_engine.decoding.plan import ExitPlan
from multiexit_engine.runtime.rows.flight import Place
from multiexit_engine.runtime.rows.logit_rows import LogitRow
from multiexit_engine.transfer import to_device


class StatesAtLayer(Protocol):
    """Rows that have come to a layer, as a flight has them."""

    def rows_of(self, places: Sequence[Place]) -> list[int | None]:
        """The rows in which these positions stand; None where one is not here."""

    def take(self, rows: list[int]) -> Tensor:
        """[rows, hidden]: the states of some rows."""


@dataclass(slots=True)
class LogitSlice:
    """Rows whose distributions are made together, with the states they need.

    Rows are direct where nobody looks at the distribution itself: ops choose their tokens.
    """

    rows: list[LogitRow]
    plan: ExitPlan
    is_direct: bool = False
    _parts: dict[int, list[tuple[list[int], Tensor]]] = field(default_factory=dict)

    def keep(self, layer: int, flight: StatesAtLayer) -> None:
        """Take the states of those rows that have come to a layer where they are needed."""
        wanted = [self.rows[r] for r in self.plan.rows_at.get(layer, ())]
        if not wanted:
            return
        rows = flight.rows_of([(row.item, row.position) for row in wanted])
        here = [place for place, row in enumerate(rows) if row is not None]
        if here:
            states = flight.take([row for row in rows if row is not None])
            self._parts.setdefault(layer, []).append((here, states))

    def give(self, layer: int, rows: Sequence[LogitRow], states: Tensor) -> None:
        """Take those states at a layer, of some rows, that its own rows need there."""
        wanted = {id(self.rows[r]): i for i, r in enumerate(self.plan.rows_at.get(layer, ()))}
        given = [place for place, row in enumerate(rows) if id(row) in wanted]
        if given:
            if len(given) < len(rows):
                states = states.index_select(0, to_device(given, states.device))
            here = [wanted[id(rows[place])] for place in given]
            self._parts.setdefault(layer, []).append((here, states))

    @property
    def needs_drafts(self) -> bool:
        """Whether what is chosen depends on the drafts before, as penalties and bans do."""
        return any(row.needs_drafts for row in self.rows)

    def take_over(self, other: LogitSlice, start: int) -> None:
        """Take the states of another slice, whose rows stand here from ``start`` on."""
        for layer, states in other.taps.items():
            places = {row: place for place, row in enumerate(self.plan.rows_at[layer])}
            here = [places[start + row] for row in other.plan.rows_at[layer]]
            self._parts.setdefault(layer, []).append((here, states))

    @property
    def taps(self) -> dict[int, Tensor]:
        """For each layer of the plan the states of its rows, in the plan's order."""
        return {layer: _in_order(parts) for layer, parts in self._parts.items()}


def _in_order(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    if len(parts) == 1:
        return parts[0][1]
    states = torch.cat([part for _, part in parts])
    places = torch.tensor([place for places, _ in parts for place in places])
    return states.index_select(0, to_device(places.argsort(), states.device))
