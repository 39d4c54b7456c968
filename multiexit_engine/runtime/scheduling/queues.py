"""Who runs and who waits: units in order of arrival, and the seats that they take.

Knows nothing of KV blocks, token budgets or of when a unit may run.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

from multiexit_engine.request import Request, Sequence


@dataclass(eq=False, slots=True)
class Unit:
    """Sequences that are admitted, scheduled and preempted together.

    One sequence, or all beams of a beam search.

    Attributes:
        request: whose sequences they are.
        order: arrival of the request, then index of the sequence; smaller is older.
        sequences: the living ones; none has finished.
        seats: sequences it may become: the width of its request until the others are forked off.
        is_running: it stands in the running queue, not in the waiting one.
        was_admitted: it has run before.
        prefix_keys: for each sequence the keys of the blocks that it may reuse; None unless known.
    """

    request: Request
    order: tuple[int, int]
    sequences: list[Sequence]
    seats: int
    is_running: bool = False
    was_admitted: bool = False
    prefix_keys: list[list[bytes]] | None = None

    def pending(self) -> list[tuple[Sequence, int]]:
        """Which of its sequences can compute tokens now, and how many.

        Beams are computed up to their last tokens; these then come all together.
        """
        if len(self.sequences) == 1:
            sequence = self.sequences[0]
            count = sequence.num_tokens_at_once
            return [(sequence, count)] if count else []
        behind = [(s, s.num_tokens - 1 - s.num_computed_tokens) for s in self.sequences]
        late = [(sequence, count) for sequence, count in behind if count > 0]
        return late or [(sequence, 1) for sequence, count in behind if count == 0]


def _order(unit: Unit) -> tuple[int, int]:
    return unit.order


class Queues:
    """The running and the waiting units, each in order of arrival, running before waiting."""

    def __init__(self, num_seats: int) -> None:
        self.running: list[Unit] = []
        self.waiting: deque[Unit] = deque()
        self.num_seats_left = num_seats

    @property
    def num_running_sequences(self) -> int:
        return sum(len(unit.sequences) for unit in self.running)

    def admit_first(self) -> Unit:
        """Move the oldest waiting unit to the running ones."""
        unit = self.waiting.popleft()
        self.num_seats_left -= unit.seats
        unit.is_running = True
        self.running.append(unit)
        return unit

    def preempt_youngest(self) -> Unit:
        """Move the youngest running unit to the front of the waiting ones."""
        unit = self.running.pop()
        self.num_seats_left += unit.seats
        unit.is_running = False
        self.waiting.appendleft(unit)
        return unit

    def split_off(self, parent: Unit, sequence: Sequence) -> Unit:
        """Seat a further sequence of a running unit's request on one of the unit's seats."""
        assert parent.seats > 1, "a request has no more sequences than its width"
        parent.seats -= 1
        order = (parent.order[0], sequence.index)
        unit = Unit(parent.request, order, [sequence], 1, is_running=True, was_admitted=True)
        insort(self.running, unit, key=_order)
        return unit

    def remove(self, unit: Unit) -> None:
        """Drop a unit from the queue in which it stands."""
        if unit.is_running:
            self.running.remove(unit)
            self.num_seats_left += unit.seats
        else:
            self.waiting.remove(unit)

    def running_from(self, order: tuple[int, int]) -> list[Unit]:
        """The running units, the first one not older than ``order`` first, then round."""
        first = bisect_left(self.running, order, key=_order)
        return self.running[first:] + self.running[:first]
