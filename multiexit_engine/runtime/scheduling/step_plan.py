"""A step while it is put together: what was planned for a unit can still be taken back.

Knows nothing of who may run or of how blocks are found.
"""

from __future__ import annotations

from collections.abc import Iterator

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence
from multiexit_engine.request import Sequence
from multiexit_engine.runtime.rows.alternatives import alternatives_of
from multiexit_engine.runtime.scheduling.queues import Unit


class StepPlan:
    """Chunks and block copies by unit, in the order in which they were planned.

    Attributes:
        num_tokens_left: of the step's budget.
        num_source_tokens_left: of a second budget of the same size, for what encoders read.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens_left = num_tokens
        self.num_source_tokens_left = num_tokens
        self._unread: list[Sequence] = []
        self._chunks: dict[Unit, list[ScheduledSequence]] = {}
        self._copies: dict[Unit, list[tuple[int, int]]] = {}

    def add_chunk(self, unit: Unit, chunk: ScheduledSequence) -> None:
        self._chunks.setdefault(unit, []).append(chunk)
        self.num_tokens_left -= chunk.num_tokens

    def add_copies(self, unit: Unit, copies: list[tuple[int, int]]) -> None:
        self._copies.setdefault(unit, []).extend(copies)

    def has_room_for_source(self, num_tokens: int) -> bool:
        """Whether a source of this length may still be encoded; the first one of a step may."""
        return not self._unread or num_tokens <= self.num_source_tokens_left

    def add_unread(self, sequence: Sequence) -> None:
        """Encode the source of a sequence that was admitted in this step, so stays in it."""
        self._unread.append(sequence)
        self.num_source_tokens_left -= len(sequence.request.source_token_ids)

    def chunks(self) -> list[tuple[Unit, ScheduledSequence]]:
        """Every chunk with its unit, in the order in which they were planned."""
        return [(unit, chunk) for unit, chunks in self._chunks.items() for chunk in chunks]

    def extend(
        self, unit: Unit, chunk: ScheduledSequence, num_drafts: int, alternatives: tuple[int, ...]
    ) -> None:
        """Let a planned chunk draft tokens, too."""
        chunks = self._chunks[unit]
        drafting = chunk._replace(num_drafts=num_drafts, alternatives=alternatives)
        chunks[chunks.index(chunk)] = drafting
        self.num_tokens_left -= num_drafts + len(alternatives)

    def drop(self, unit: Unit) -> None:
        """Take back what a unit got, if it got anything: it was preempted."""
        self._copies.pop(unit, None)
        self.num_tokens_left += sum(c.num_tokens for c in self._chunks.pop(unit, ()))

    def batch(self) -> ScheduledBatch | None:
        """The step as the runner sees it; None when nothing was planned."""
        if not self._chunks:
            return None
        chunks = [chunk for chunks in self._chunks.values() for chunk in chunks]
        chunks.sort(key=lambda chunk: (-chunk.sequence.request.depth, -chunk.num_drafts))
        copies = tuple(pair for pairs in self._copies.values() for pair in pairs)
        return ScheduledBatch(tuple(chunks), copies, tuple(self._unread))


def less_and_less(
    sequence: Sequence, wanted: int, room: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """What a sequence may draft within a number of rows: all that it wants, then less of it.

    Yields numbers of drafts and with them alternatives, as ``ScheduledSequence`` has them; drafts
    alone are better than fewer with alternatives.
    """
    others = alternatives_of(sequence, wanted)
    if others and wanted + len(others) <= room:
        yield wanted, others
    for num_drafts in range(min(wanted, room), 0, -1):
        yield num_drafts, ()
