"""The batches of the rounds of sequences that draft together, one token each in every round.

Knows where their rows lie in the cache, all rows built at once: a round of a small model takes
less time than the tensors that describe it. Nothing of layers or of how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import is_

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
        together: every item's last token and its drafts, item by item; tokens that only the device
            knows are 0.
    """

    def __init__(
        self, items: Sequence[ScheduledSequence], block_size: int, device: torch.device
    ) -> None:
        self._items = items
        self.count = items[0].num_drafts
        spans = [ScheduledSequence(i.sequence, i.stop - 1, 1 + i.num_drafts) for i in items]
        self.together = ForwardBatch.build(ScheduledBatch(tuple(spans)), block_size, device)
        self._sources = ForwardBatch.sources_of(self.rows(0), block_size, device)
        starts = self.together.layout.query_starts
        self._num_rows = [
            sum(item.num_drafts > number for item in items) for number in range(self.count)
        ]
        rows = [starts[i] + r for r, count in enumerate(self._num_rows) for i in range(count)]
        rows += [stop - 1 for stop in starts[1:]]
        index = to_device(rows, device, torch.int64)
        self._tokens, self._positions, self._slots = (
            column.index_select(0, index)
            for column in (
                self.together.token_ids,
                self.together.positions,
                self.together.slot_mapping,
            )
        )
        self._contexts = (self._positions + 1).int()
        self._starts = to_device(range(len(items) + 1), device, torch.int32)
        self._first_rows = [*accumulate(self._num_rows, initial=0)]

    def is_of(self, items: Sequence[ScheduledSequence]) -> bool:
        """Whether these are the items, and in the same order."""
        return len(items) == len(self._items) and all(map(is_, items, self._items))

    @property
    def first_tokens(self) -> Tensor:
        """[items] int64: what the first round reads."""
        return self._tokens[: len(self._items)]

    def rows(self, number: int) -> list[ScheduledSequence]:
        """What a round computes of each of its items."""
        return [
            ScheduledSequence(item.sequence, item.stop - 1 + number, 1)
            for item in self._items
            if item.num_drafts > number
        ]

    def forward(self, number: int, tokens: Tensor) -> ForwardBatch:
        """The tensors of a round, counted from 0; ``tokens`` [rows] int64 are what it reads."""
        contexts = [item.stop + number for item in self._items[: self._num_rows[number]]]
        return self._batch(self._first_rows[number], contexts, tokens)

    def last(self, tokens: Tensor) -> ForwardBatch:
        """Those of the last drafts, ``tokens`` [items] int64, which no round reads."""
        contexts = [item.stop + item.num_drafts for item in self._items]
        return self._batch(self._first_rows[-1], contexts, tokens)

    def _batch(self, first: int, contexts: Sequence[int], tokens: Tensor) -> ForwardBatch:
        count = len(contexts)
        rows = slice(first, first + count)
        layout = SequenceLayout(
            query_lens=(1,) * count,
            context_lens=tuple(contexts),
            cu_query_lens=self._starts[: count + 1],
            context_lens_device=self._contexts[rows],
            block_tables=self.together.layout.block_tables[:count],
        )
        sources = None if self._sources is None else self._sources.first(count)
        return ForwardBatch(tokens, self._positions[rows], self._slots[rows], layout, sources)
