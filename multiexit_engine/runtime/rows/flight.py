"""The rows of a step on their way through the layers: who is in, who joins, who leaves.

Knows positions of sequences and hidden states; nothing of modes, heads or tokens' choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from multiexit_engine.batch import CopiedRows, ForwardBatch, ScheduledBatch, ScheduledSequence
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.request import Joining
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.transfer import to_device

Place = tuple[int, int]  # item of the step, position in its sequence


class Flight:
    """The rows that are at one layer, those of an item always together and up to its end.

    Args:
        model: runs them.
        kv_cache: of the model.
        states: where joining rows come from.
        items: by their place in the step, in order of falling depth, the rows that begin at
            layer 0, or enter later.
        joining: for each item what joins it.
        tokens: for items whose one row is not a token of the sequence yet, that token, [1] int64.
        forward: the tensors of the items' rows, tokens included, where they have been built.
        entering: items whose own row was kept, too, and the layer at which it comes back.
        together: the tensors of all rows once every item was joined by what joins it, which comes
            at one layer then, where they have been built.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        states: ExitStates,
        items: Mapping[int, ScheduledSequence],
        joining: Mapping[int, Sequence[Joining]] | None = None,
        tokens: Mapping[int, Tensor] | None = None,
        forward: ForwardBatch | None = None,
        entering: Mapping[int, int] | None = None,
        together: ForwardBatch | None = None,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        # keys and values that lie aside can be found one by one only
        self._is_by_token = any(item.aside is not None for item in items.values())
        self._blocks = kv_cache.by_token if self._is_by_token else kv_cache
        self._states = states
        self._items = dict(items)
        self._joining = joining or {}
        self._aboard = list(items)
        # of items that copy keys and values, where the rows begin for which that is done now
        self._copied_from: dict[int, int] = {}
        self._copied: CopiedRows | None = None
        self._forward = forward or self._build()
        self._together = together
        self.hidden = model.embed(self._token_ids(tokens or {}), self._forward.positions)
        self._entering = dict(entering or {})
        self.leave(self._entering)

    @property
    def aboard(self) -> Sequence[int]:
        """The items whose rows are here, in order."""
        return self._aboard

    @property
    def is_over(self) -> bool:
        """Whether no rows are here and none will be."""
        return not self._aboard and not self._entering

    def dismiss(self, items: Collection[int]) -> None:
        """Let items that were to come back stay where they are."""
        for item in items:
            del self._entering[item]

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0] if self._aboard else 0

    def first_position(self, item: int) -> int:
        """Where the rows of an item begin in its sequence, those that joined it included."""
        return self._copied_from.get(item, self._items[item].start)

    def going_beyond(self, layer: int) -> list[int]:
        """Those of the items here whose requests need layers above this one."""
        return [i for i in self._aboard if self._items[i].sequence.request.depth > layer]

    def num_rows_beyond(self, layer: int, without: Collection[int]) -> int:
        """Rows here of requests that need layers above this one, but for those of some items."""
        going = (item for item in self.going_beyond(layer) if item not in without)
        return sum(self._items[item].num_tokens for item in going)

    def run(self, start: int, stop: int) -> None:
        """Run the 0-based blocks ``start`` to ``stop - 1`` on all rows that are here."""
        if not self._aboard:
            return
        batch = self._forward
        if self._copied is not None:
            batch = replace(batch, copied=self._copied)
        self.hidden = self._model.run_layers(self.hidden, start, stop, self._blocks, batch)

    def rows_of(self, places: Sequence[Place]) -> list[int | None]:
        """The rows of ``hidden`` in which these positions stand; None where one is not here."""
        starts = self._forward.layout.query_starts
        first = dict(zip(self._aboard, starts, strict=False))
        rows: list[int | None] = []
        for item, position in places:
            if item in first and position in (span := self._items[item]).positions:
                rows.append(first[item] + position - span.start)
            else:
                rows.append(None)
        return rows

    def take(self, rows: list[int]) -> Tensor:
        """[rows, hidden]: the states of some rows after the last layer that ran."""
        if len(rows) == self.num_rows and rows == list(range(len(rows))):
            return self.hidden
        return self._rows(rows)

    def narrow(self, num_items: int) -> None:
        """Go on with the rows of the first ``num_items`` items of the step."""
        count = len(self._aboard)
        while count and self._aboard[count - 1] >= num_items:
            count -= 1
        if count == len(self._aboard):
            return
        self._aboard = self._aboard[:count]
        self._forward = self._forward.first(count)
        self._copied = self._copied_rows()
        self.hidden = self.hidden[: self._forward.num_tokens]

    def leave(self, items: Collection[int]) -> None:
        """Take the rows of these items out."""
        if not items:
            return
        starts = self._forward.layout.query_starts
        staying = [place for place, item in enumerate(self._aboard) if item not in items]
        rows = [row for place in staying for row in range(starts[place], starts[place + 1])]
        self._aboard = [self._aboard[place] for place in staying]
        if self._aboard:
            self._forward = self._build()
            self._copied = self._copied_rows()
            self.hidden = self._rows(rows)

    def keep(self, items: Collection[int]) -> None:
        """Keep the states of the rows of these items, each in its KV slot."""
        if len(items) == len(self._aboard):
            self._states.keep(self._forward.slot_mapping, self.hidden)
            return
        rows = self._rows_of_items(items)
        self._states.keep(self._forward.slot_mapping[rows], self.hidden.index_select(0, rows))

    def join(self, layer: int) -> None:
        """Add the rows that were kept at this layer to the items that are here.

        Where keys and values are copied, the layers above make them of the states that were kept,
        and nothing else.
        """
        entering = [item for item, at in self._entering.items() if at == layer]
        self.dismiss(entering)
        here = sorted([*self._aboard, *entering])
        spans = [self._items[item] for item in here]
        for item, span in zip(here, spans, strict=True):
            for entry in self._joining.get(item, ()):
                if entry.layer == layer:
                    self._take_along(item, span.sequence, entry.start)
        counts = [
            (span.stop if item in entering else span.start) - self._items[item].start
            for item, span in zip(here, spans, strict=True)
        ]
        if not any(counts):
            self._aboard = here
            self._copied = self._copied_rows()
            return
        if self._aboard:
            # beside the others, so that all are taken in their new order
            self._states.keep(self._forward.slot_mapping, self.hidden)
        self._aboard = here
        self._copied = self._copied_rows()
        self._forward = self._together or self._build()
        self.hidden = self._states.take(self._forward.slot_mapping)

    def _take_along(self, item: int, sequence: TokenSequence, start: int) -> None:
        if sequence.request.copies_kv:
            self._copied_from[item] = start
        else:
            stop = self._items[item].stop
            self._items[item] = ScheduledSequence(sequence, start, stop - start)

    def _copied_rows(self) -> CopiedRows | None:
        """The rows of the items here whose keys and values are copied."""
        rows = [
            ScheduledSequence(self._items[item].sequence, start, self._items[item].start - start)
            for item in self._aboard
            if (start := self._copied_from.get(item, stop := self._items[item].start)) < stop
        ]
        if not rows:
            return None
        device = self._kv_cache.device
        places = ForwardBatch.build(ScheduledBatch(tuple(rows)), self._kv_cache.block_size, device)
        states = self._states.take(places.slot_mapping)
        return CopiedRows(states, places.positions, places.slot_mapping)

    def _rows(self, rows: list[int]) -> Tensor:
        # not `hidden[rows]`: PyTorch shares that out to OpenMP threads from four rows on, and they
        # spin for 4 ms afterwards on the cores that the kernels' own threads need
        return self.hidden.index_select(0, self._index(rows))

    def _rows_of_items(self, items: Collection[int]) -> Tensor:
        starts = self._forward.layout.query_starts
        return self._index(
            [
                row
                for place, item in enumerate(self._aboard)
                if item in items
                for row in range(starts[place], starts[place + 1])
            ]
        )

    def _token_ids(self, tokens: Mapping[int, Tensor]) -> Tensor:
        known = self._forward.token_ids
        if not tokens:
            return known
        starts = dict(zip(self._aboard, self._forward.layout.query_starts, strict=False))
        known[self._index([starts[item] for item in tokens])] = torch.cat(list(tokens.values()))
        return known

    def _build(self) -> ForwardBatch:
        batch = ScheduledBatch(tuple(self._items[item] for item in self._aboard))
        block_size = self._kv_cache.block_size
        forward = ForwardBatch.build(batch, block_size, self._kv_cache.device)
        return forward.by_token(batch, block_size) if self._is_by_token else forward

    def _index(self, rows: list[int]) -> Tensor:
        return to_device(rows, self._kv_cache.device, torch.int64)
