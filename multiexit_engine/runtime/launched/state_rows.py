"""Rows of the decode memory's states after a layer, as a flight would give them.

Knows nothing of how the states came to be, or of what they are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from multiexit_engine.runtime.rows.flight import Place
from multiexit_engine.transfer import to_device


class StateRows:
    """States after a layer and the row of each position that has one.

    Args:
        states: [rows of the memory, hidden].
        places: rows of positions.
    """

    def __init__(self, states: Tensor, places: Mapping[Place, int]) -> None:
        self._states = states
        self._places = places

    def rows_of(self, places: Sequence[Place]) -> list[int | None]:
        """The rows in which these positions stand."""
        return [self._places[place] for place in places]

    def take(self, rows: list[int]) -> Tensor:
        """[rows, hidden]: the states of some rows."""
        return self._states.index_select(0, to_device(rows, self._states.device))
