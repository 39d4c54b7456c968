"""How the rows of a step that get one token, or draft some before, lie in the decode memory.

Row by row of the first round, padding, the second round and so on: a round is the next token of
every sequence that drafts so many. Each takes as many rows as the first one where there is room for
that, so that few numbers of rows are captured. Without drafts there is one round. Knows sizes and
places; nothing of layers, heads or tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from multiexit_engine.batch import ScheduledSequence
from multiexit_engine.runtime.rows.flight import Place

Items = Sequence[tuple[int, ScheduledSequence]]


class NumKeys(NamedTuple):
    """How many keys a row of a step sees at most.

    Attributes:
        own: of its sequence.
        source: of its source; 0 for a decoder-only model.
    """

    own: int
    source: int = 0


@dataclass(frozen=True, slots=True)
class Rounds:
    """The rows of one step's rounds.

    Attributes:
        items: of the step, with their places in it; those with more drafts first.
        counts: rows of each round.
        sizes: rows that each runs, padding included.
        num_rows: rows that run when all rounds run together, padding included.
    """

    items: Items
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    num_rows: int

    @classmethod
    def of(cls, items: Items, padded: Callable[[int], int], most_rows: int) -> Rounds:
        """Lay out items that compute one token each.

        Args:
            items: of the step.
            padded: rounds numbers of rows up.
            most_rows: that there is room for; more are laid out, and do not fit.
        """
        by_drafts = sorted(items, key=lambda pair: -pair[1].num_drafts)
        drafts = [item.num_drafts for _, item in by_drafts]
        rounds = range(1 + drafts[0]) if drafts else range(0)
        counts = tuple(sum(count >= number for count in drafts) for number in rounds)
        even = tuple(padded(counts[0]) for _ in counts)
        sizes = even if padded(sum(even)) <= most_rows else tuple(map(padded, counts))
        num_rows = padded(sum(sizes)) if sizes else 0
        return cls(by_drafts, counts, sizes, num_rows)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each round."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @property
    def places(self) -> dict[Place, int]:
        """The row of each position that is computed."""
        return {
            (index, item.stop - 1 + number): start + row
            for number, (start, count) in enumerate(zip(self.starts, self.counts, strict=True))
            for row, (index, item) in enumerate(self.items[:count])
        }

    @property
    def batch_size(self) -> int:
        """Sequences as pieces count them, padding included.

        More than any piece is captured for where rounds differ: there are too many ways to do so.
        """
        return self.sizes[0] if len({*self.sizes}) == 1 else sys.maxsize

    @property
    def num_keys(self) -> NumKeys:
        """Of the longest context, and of the longest source."""
        return NumKeys(
            max(item.stop + item.num_drafts for _, item in self.items),
            max(len(item.sequence.request.source_token_ids) for _, item in self.items),
        )
