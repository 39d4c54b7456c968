"""A row that has not chosen its exit yet, and what the exits below said of it.

Knows nothing of layers that run or of other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan

from multiexit_engine.modes import EarlyExit
from multiexit_engine.request import Held
from multiexit_engine.runtime.logit_rows import LogitRow


@dataclass(slots=True, eq=False)
class DecidingRow:
    """One row of a step.

    Attributes:
        row: what chooses or scores.
        mode: how it decides.
        layers: where it is measured.
        value: of the last measurement.
        token: the best token of the last exit whose whole head was read.
        streak: exits in a row with this token.
    """

    row: LogitRow
    mode: EarlyExit
    layers: frozenset[int]
    value: float = nan
    token: int | None = None
    streak: int = 0

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

    def note(self, value: float, token: int) -> None:
        """Record what a whole head said."""
        if self.mode.measure == "patience":
            self.streak = self.streak + 1 if token == self.token and not isnan(value) else 1
            value = float(self.streak)
        self.value, self.token = value, token

    def held_at(self, layer: int) -> Held:
        """What it takes to go on later."""
        before = self.row.sequence.held
        num_steps = before.num_steps + 1 if before is not None and before.layer == layer else 1
        return Held(layer, num_steps, (self.value, self.token, self.streak))
