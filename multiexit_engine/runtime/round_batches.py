"""The batches of the rounds of sequences that draft together, one token each in every round.

Knows where their rows lie in the cache, all rounds built at once: a round of a small model takes
less time than the tensors that describe it. Nothing of layers or of how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.batch import (
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    SequenceLayout,
)
from multiexit_engine.transfer import to_device


class RoundBatches:
    """The rows of each round: first every item's last token, then its drafts but the last one.

    Args:
        items: by falling number of drafts, so that a round is about the first ones.
        block_size: of the cache.
        device: of the cache.

    Attributes:
        count: rounds.
    """

    def __init__(
        self, items: Sequence[ScheduledSequence], block_size: int, device: torch.device
    ) -> None:
        self._items = items
        self.count = items[0].num_drafts
        rows = [[_row(item, number) for item in items] for number in range(self.count)]
        places = [[row.start for row in own] for own in rows]
        slots = [[_slot(row, block_size) for row in own] for own in rows]
        self._positions, self._slots = to_device([places, slots], device, torch.int64)
        self._contexts = [[place + 1 for place in own] for own in places]
        self._contexts_on_device = to_device(self._contexts, device, torch.int32)
        # the last rows of all items: their block tables hold those before, too
        last = tuple(_row(item, item.num_drafts - 1) for item in items)
        self._whole = ForwardBatch.build(ScheduledBatch(last), block_size, device)
        first = [item.sequence.token_ids[item.stop - 1] for item in items]
        self.first_tokens = to_device(first, device, torch.int64)

    def num_rows(self, number: int) -> int:
        """Items that take part in a round, counted from 0."""
        return sum(item.num_drafts > number for item in self._items)

    def rows(self, number: int) -> list[ScheduledSequence]:
        """What a round computes of each of its items."""
        return [_row(item, number) for item in self._items[: self.num_rows(number)]]

    def forward(self, number: int, tokens: Tensor) -> ForwardBatch:
        """The tensors of a round; ``tokens`` [rows] int64 are what it reads."""
        count = tokens.shape[0]
        whole = self._whole.first(count)
        layout = SequenceLayout(
            query_lens=whole.layout.query_lens,
            context_lens=tuple(self._contexts[number][:count]),
            cu_query_lens=whole.layout.cu_query_lens,
            context_lens_device=self._contexts_on_device[number, :count],
            block_tables=whole.layout.block_tables,
        )
        places = self._positions[number, :count], self._slots[number, :count]
        return ForwardBatch(tokens, *places, layout, whole.sources)


def _row(item: ScheduledSequence, number: int) -> ScheduledSequence:
    return ScheduledSequence(item.sequence, item.stop - 1 + number, 1)


def _slot(row: ScheduledSequence, block_size: int) -> int:
    """Of a row beyond its item's drafts, which nobody computes, any slot."""
    table, block = row.sequence.block_table, row.start // block_size
    return table[block] * block_size + row.start % block_size if block < len(table) else 0
