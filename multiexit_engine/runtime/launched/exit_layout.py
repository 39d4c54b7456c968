"""How the rows of a launched step lie in which some choose their exit.

First those that get a token, then the earlier ones of their sequences that wait for layers, then
padding; behind them the ends of prompts, which are only asked. Knows sequences and numbers of rows;
nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from multiexit_engine.request import Joining
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.runtime.drafts.draft_rounds import Items
from multiexit_engine.runtime.launched.launched_step import Leaving
from multiexit_engine.runtime.rows.flight import Place

# numbers of waiting rows that steps are launched for, so that few are captured
WAITING_ROWS = (0, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, slots=True)
class ExitLayout:
    """The rows of one step.

    Attributes:
        joins: for each position that waits the layer after which it does, in order of rows; 0 for
            one that the step before runs. Where that step's leaving decides, the least.
        first_waiting: the row of the first of them.
        num_rows: that run, padding included.
        completed: items whose waiting rows run whatever their last row does.
        sources: for items of which the step before decides who still waits, its row that does.
    """

    joins: Mapping[Place, int]
    first_waiting: int
    num_rows: int
    completed: frozenset[int]
    sources: Mapping[int, int]

    @property
    def places(self) -> dict[Place, int]:
        """The row of each position that waits."""
        return {place: row for row, place in enumerate(self.joins, self.first_waiting)}


def exit_layout(
    items: Items,
    leaving: Mapping[TokenSequence, Leaving],
    first_waiting: int,
    most_rows: int,
    most_waiting: int,
) -> ExitLayout:
    """Lay out the waiting rows of items: of the unknown ones all that may wait.

    Args:
        items: of a step, one token each, with their places in it.
        leaving: rows of the step before of which it is not known whether they left.
        first_waiting: rows before them, padding included.
        most_rows: that there is room for; more are laid out, and do not fit.
        most_waiting: after the step. Where there could be more, sequences with the most are
            completed.
    """
    joins = {
        (index, position): layer
        for index, item in items
        for position, layer in _waiting(item.sequence, item.start, leaving.get(item.sequence))
    }
    count = len(joins)
    padded = next((size for size in WAITING_ROWS if size >= count), count)
    num_rows = first_waiting + max(count, min(padded, most_rows - first_waiting))
    counts: dict[int, int] = {}
    for index, _ in joins:
        counts[index] = counts.get(index, 0) + 1
    completed = _completed(counts, most_waiting - len(items))
    sources = {
        index: leaving[item.sequence].row for index, item in items if item.sequence in leaving
    }
    return ExitLayout(joins, first_waiting, num_rows, completed, sources)


def waits_after(
    sequence: TokenSequence, start: int, left_at: int, is_completed: bool
) -> tuple[Joining, ...]:
    """What of a sequence waits after its last row left a step.

    Args:
        sequence: as it was before the step.
        start: position of that row.
        left_at: the 1-based layer.
        is_completed: whether the rows that waited ran through all layers.
    """
    entries = () if is_completed else sequence.waiting
    deeper = tuple(entry for entry in entries if entry.layer >= left_at)
    came_along = [entry.start for entry in entries if entry.layer < left_at]
    if deeper and deeper[-1].layer == left_at:
        return deeper
    return (*deeper, Joining(left_at, min([*came_along, start])))


def _waiting(
    sequence: TokenSequence, stop: int, leaving: Leaving | None
) -> Iterator[tuple[int, int]]:
    """Positions of a sequence before ``stop`` that wait, or may, and the layers after which.

    The step before may have left its own row, 0, beside those that waited until then.
    """
    entries = () if leaving is not None and leaving.completes else sequence.waiting
    if leaving is not None:
        entries = (*entries, Joining(0, stop - 1))
    for entry, following in pairwise((*entries, Joining(0, stop))):
        for position in range(entry.start, following.start):
            yield position, entry.layer


def _completed(counts: Mapping[int, int], room: int) -> frozenset[int]:
    """The items with the most waiting rows, so that no more than ``room`` are left of all."""
    left = sum(counts.values())
    found = []
    for index in sorted(counts, key=lambda index: -counts[index]):
        if left <= room:
            break
        found.append(index)
        left -= counts[index]
    return frozenset(found)
