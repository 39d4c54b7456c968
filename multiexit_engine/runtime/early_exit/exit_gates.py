"""What an exit's head says of rows that may leave there: by codes where they decide, else exact.

Knows nothing of layers that run, or of what becomes of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from multiexit_engine.decoding.certainty import Quantity, certain_rows, lone_best_tokens
from multiexit_engine.decoding.gates import bounds, read_head
from multiexit_engine.layers.exit_heads import ExitHeads, Head, HeadOperands
from multiexit_engine.layers.rough_heads import FEW_ROWS, RoughReading
from multiexit_engine.modes import HEAD_MEASURES, Measure
from multiexit_engine.runtime.early_exit.deciding_rows import DecidingRow

_QUANTITIES: dict[Measure, Quantity] = {
    "max_prob": "max_prob",
    "margin": "margin",
    "entropy": "entropy",
}


class HeadGate:
    """The head of one exit.

    Args:
        heads: of the model.
        layer: of the exit.
        states: gives [rows, hidden], the states of some rows after this layer.
    """

    def __init__(
        self, heads: ExitHeads, layer: int, states: Callable[[Sequence[DecidingRow]], Tensor]
    ) -> None:
        self._rough = heads.rough
        self._operands: Callable[[Sequence[DecidingRow]], HeadOperands] = lambda rows: (
            heads.operands(Head(layer), states(rows))
        )

    def ask(self, rows: Sequence[DecidingRow]) -> None:
        """Tell rows, whose measures read heads, whether they may leave.

        Where a row reports what was measured, the whole head is read for it, so it is for all.
        """
        self._count([row for row in rows if row.mode.measure == "patience"])
        measured = [row for row in rows if row.mode.measure in HEAD_MEASURES]
        asking = [row for row in measured if row.mode.shortlist is None]
        for shortlist in sorted({row.mode.shortlist or 0 for row in measured} - {0}):
            listed = [row for row in measured if row.mode.shortlist == shortlist]
            asking += self._not_ruled_out(listed, shortlist)
        self._read(self._left_open(asking))

    def _count(self, rows: Sequence[DecidingRow]) -> None:
        """Rows whose measure is in which exits agree: of the head they want the best token only."""
        if rows:
            tokens, log_probs = self._rough.best_tokens(*self._operands(rows))
            for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
                row.note(log_prob, token)

    def _not_ruled_out(self, rows: Sequence[DecidingRow], shortlist: int) -> list[DecidingRow]:
        """The rows that pass by the first tokens alone."""
        if left := self._left_open(rows, shortlist):
            measures = [row.mode.measure for row in left]
            values = bounds(measures, self._operands(left), shortlist).tolist()
            for row, value in zip(left, values, strict=True):
                row.note(value)
        return [row for row in rows if row.is_sure]

    def _left_open(
        self, rows: Sequence[DecidingRow], shortlist: int | None = None
    ) -> list[DecidingRow]:
        """Let codes decide what they make certain; gives the other rows."""
        if not rows or any(row.is_reported for row in rows):
            return list(rows)
        operands = self._operands(rows)
        reading = self._rough.statistics(*operands, shortlist)
        if reading is None:
            return list(rows)
        left = _open_rows(rows, reading, shortlist)
        if len(rows) > FEW_ROWS and 0 < len(left) < len(rows):
            finer = self._rough.statistics(*self._operands(left), shortlist, num_terms=2)
            left = left if finer is None else _open_rows(left, finer, shortlist)
        self._rough.note_test(operands.weight, shortlist, is_spared=not left)
        return left

    def _read(self, rows: Sequence[DecidingRow]) -> None:
        if rows:
            reading = read_head([row.mode.measure for row in rows], self._operands(rows))
            for row, *found in zip(rows, *(part.tolist() for part in reading), strict=True):
                row.note(*found)


def _quantity(row: DecidingRow, shortlist: int | None) -> Quantity:
    """What stands for the measure of a row in the comparison with its threshold."""
    is_bound = row.mode.measure == "entropy" and shortlist is not None
    return "surprise" if is_bound else _QUANTITIES[row.mode.measure]


def _threshold(row: DecidingRow) -> float:
    assert row.mode.threshold is not None, "the intake replaces what is calibrated by its threshold"
    return row.mode.threshold


def _open_rows(
    rows: Sequence[DecidingRow], reading: RoughReading, shortlist: int | None
) -> list[DecidingRow]:
    """Decide rows by rough logits where these are near enough; gives the others."""
    kinds = [_quantity(row, shortlist) for row in rows]
    sure, unsure = certain_rows(*reading, kinds, [_threshold(row) for row in rows])
    columns = sure, unsure, lone_best_tokens(*reading), reading.found.tokens
    left = []
    for row, passes, fails, is_lone, token in zip(
        rows, *(column.tolist() for column in columns), strict=True
    ):
        if passes or fails:
            row.rule(is_sure=passes, token=token if is_lone else None)
        else:
            left.append(row)
    return left
