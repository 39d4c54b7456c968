"""A row that has not chosen its exit yet, and what the exits below said of it.

Knows nothing of layers that run or of other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan

from multiexit_engine.decoding.gates import passes
from multiexit_engine.modes import EarlyExit
from multiexit_engine.request import Held
from multiexit_engine.runtime.rows.logit_rows import LogitRow


@dataclass(slots=True, eq=False)
class DecidingRow:
    """One row of a step.

    Attributes:
        row: what chooses or scores.
        mode: how it decides.
        layers: where it is measured.
        value: of the last measurement.
        token: the best token of the last exit that was asked for it; None where that did not tell.
        streak: exits in a row with this token.
        is_sure: whether the last exit's measure lets it leave.
    """

    row: LogitRow
    mode: EarlyExit
    layers: frozenset[int]
    value: float = nan
    token: int | None = None
    streak: int = 0
    is_sure: bool = False

    @classmethod
    def of(cls, row: LogitRow, layers: frozenset[int]) -> DecidingRow:
        """A row that begins, or goes on as it was held."""
        assert isinstance(row.mode, EarlyExit), "only these decide"
        held = row.sequence.held
        return cls(row, row.mode, layers, *(() if held is None else held.said))

    @property
    def may_leave(self) -> bool:
        """Prompts run through all layers, so that it does not matter how they are cut."""
        return self.row.position >= len(self.row.sequence.request.prompt_token_ids)

    def may_wait_at(self, layer: int) -> bool:
        """Whether it can go on from a layer in a later step: nobody needs its state until then."""
        return self.may_leave and layer in self.layers and not self.compares_at(layer)

    def compares_at(self, layer: int) -> bool:
        """Whether its next measurement compares the next layer's output with this layer's."""
        return self.mode.measure == "similarity" and layer + 1 in self.layers

    @property
    def is_reported(self) -> bool:
        """Whether what is measured of it is told."""
        return self.row.target is None and self.row.sequence.request.sampling.confidences

    def note(self, value: float, token: int | None = None) -> None:
        """Record what was measured."""
        if self.mode.measure == "patience":
            self.streak = self.streak + 1 if token == self.token and not isnan(value) else 1
            value = float(self.streak)
        self.value, self.token, self.is_sure = value, token, passes(self.mode, value)

    def rule(self, *, is_sure: bool, token: int | None) -> None:
        """Record what was decided without the value."""
        self.value, self.token, self.is_sure = nan, token, is_sure

    def held_at(self, layer: int) -> Held:
        """What it takes to go on later."""
        before = self.row.sequence.held
        num_steps = before.num_steps + 1 if before is not None and before.layer == layer else 1
        return Held(layer, num_steps, (self.value, self.token, self.streak))
