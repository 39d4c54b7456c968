"""One step's work: what the scheduler hands the runner, the tensors the model sees, the result.

Sequences stand in order of falling depth, so that those which need the deeper layers are always
the first ones and a deeper segment works on a plain slice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multiexit_engine.request import ChosenToken, Held, Joining, Request, ScoredToken, Sequence
from multiexit_engine.transfer import to_device


class ScheduledSequence(NamedTuple):
    """A sequence and how many of its tokens this step computes.

    Tokens ``[start, start + num_tokens)`` of the sequence are computed; its block table already
    covers them. ``start`` is its ``num_computed_tokens`` when it was scheduled. The table covers
    ``num_drafts`` tokens more, which the step may draft and check, and behind these one for each
    of ``alternatives``: other tokens for the places of drafts, named by the number of that draft,
    from 0. Of one row that is such an alternative itself, ``aside`` tells the place in the table
    of its key and value, which its position does not.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_drafts: int = 0
    alternatives: tuple[int, ...] = ()
    aside: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def positions(self) -> range:
        return range(self.start, self.stop)

    @property
    def reaches_end(self) -> bool:
        """Whether its last known token is computed, so that a next one can be chosen."""
        return self.stop == self.sequence.num_tokens

    @property
    def left_at(self) -> int | None:
        """The layer at which its rows left before, where keys and values were copied then.

        They are computed again, and have to leave there again.
        """
        sequence = self.sequence
        may_return = sequence.request.copies_kv and self.start >= sequence.num_exact_at_most
        return sequence.layer_left_at(self.start) if may_return else None


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """What one step computes.

    Attributes:
        scheduled: in order of falling ``request.depth``, of these of falling ``num_drafts``.
        block_copies: (source, target) KV blocks to copy before anything is written.
        unread: sequences whose source has to be encoded into their source blocks first.
    """

    scheduled: tuple[ScheduledSequence, ...]
    block_copies: tuple[tuple[int, int], ...] = ()
    unread: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens + s.num_drafts for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class BeamCandidates:
    """The best continuations of each beam of a request: accumulated scores and token ids."""

    values: list[list[float]]
    token_ids: list[list[int]]


@dataclass(frozen=True, slots=True)
class CheckedDrafts:
    """What the check of a sequence's drafts gave.

    Attributes:
        tokens: its next tokens: the drafts that were accepted, then one token of the target's own.
        num_drafts: drafts that were checked, one after the other.
        num_alternatives: other tokens for their places that were checked.
        alternative: which of these was accepted after the last right draft, if one was.
    """

    tokens: list[ChosenToken]
    num_drafts: int
    num_alternatives: int = 0
    alternative: int | None = None

    @property
    def num_accepted(self) -> int:
        """Tokens that the exit had guessed."""
        return len(self.tokens) - 1

    @property
    def num_right(self) -> int:
        """Drafts that were accepted, without an alternative."""
        return self.num_accepted - (self.alternative is not None)


@dataclass(slots=True)
class StepOutput:
    """What a step gave, on the host.

    Attributes:
        tokens: for each sequence that reached its end its new token; ``n`` of them after a
            prompt that is to be continued ``n`` times.
        checked: for each sequence with drafts its next tokens.
        beams: for each beam-search request the candidates of its beams.
        scored: for each request the log-probabilities of its prompt tokens, in order.
        waiting: sequences of which tokens still lack the keys and values above some layer.
        held: those of them whose last row waits to go on.
        failures: requests whose own code or numbers failed, with the reason.
        num_candidates: for each distribution that was contrasted to choose a token, how many tokens
            were plausible.
    """

    tokens: list[tuple[Sequence, list[ChosenToken]]] = field(default_factory=list)
    checked: list[tuple[Sequence, CheckedDrafts]] = field(default_factory=list)
    beams: list[tuple[Request, BeamCandidates]] = field(default_factory=list)
    scored: list[tuple[Request, list[ScoredToken]]] = field(default_factory=list)
    waiting: dict[Sequence, tuple[Joining, ...]] = field(default_factory=dict)
    held: dict[Sequence, Held] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    num_candidates: list[int] = field(default_factory=list)

    def note_candidates(self, counts: Iterable[int] = ()) -> None:
        """Add what rows of a slice kept; rows without a contrast have 0."""
        self.num_candidates += [count for count in counts if count]


@dataclass(frozen=True)
class SequenceLayout:
    """Where the sequences of a flat batch lie, in it and in the paged cache.

    Attributes:
        query_lens: new tokens of each sequence, on the host.
        context_lens: keys of each sequence after this step's tokens were written, on the host.
        cu_query_lens: [seqs + 1] int32, first flat row of each sequence.
        context_lens_device: [seqs] int32, ``context_lens`` on the device.
        block_tables: [seqs, max_blocks] int32, padded with -1.
        has_bounds: ``context_lens`` are upper bounds: what is captured for this layout serves every
            ``context_lens_device`` within them. ``query_lens`` are all 1 then.
        scratch: what an op works out from the layout once a step and reuses in every layer.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    cu_query_lens: Tensor
    context_lens_device: Tensor
    block_tables: Tensor
    has_bounds: bool = False
    scratch: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        tables: list[list[int]],
        block_size: int,
        device: torch.device,
    ) -> SequenceLayout:
        """Copy a layout to the device; of each block table only what holds the context is used."""
        num_blocks = [-(-length // block_size) for length in context_lens]
        width = max(num_blocks)
        padded = [
            table[:count] + [-1] * (width - count)
            for table, count in zip(tables, num_blocks, strict=True)
        ]

        def on_device(values: list[int] | list[list[int]]) -> Tensor:
            return to_device(values, device, torch.int32)

        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            cu_query_lens=on_device(list(accumulate(query_lens, initial=0))),
            context_lens_device=on_device(context_lens),
            block_tables=on_device(padded),
        )

    @cached_property
    def query_starts(self) -> tuple[int, ...]:
        """First flat row of each sequence and the end of the last one, on the host."""
        return tuple(accumulate(self.query_lens, initial=0))

    def by_token(self, block_size: int) -> SequenceLayout:
        """The same for a cache whose blocks hold one token each, its tables free to be changed."""
        offsets = torch.arange(block_size, dtype=torch.int32, device=self.block_tables.device)
        tables = (self.block_tables[:, :, None] * block_size + offsets).flatten(1)
        return replace(self, block_tables=tables, scratch={})

    def first(self, num_seqs: int) -> SequenceLayout:
        """The layout of the first ``num_seqs`` sequences."""
        return SequenceLayout(
            query_lens=self.query_lens[:num_seqs],
            context_lens=self.context_lens[:num_seqs],
            cu_query_lens=self.cu_query_lens[: num_seqs + 1],
            context_lens_device=self.context_lens_device[:num_seqs],
            block_tables=self.block_tables[:num_seqs],
            has_bounds=self.has_bounds,
        )


class CopiedRows(NamedTuple):
    """Rows that only give keys and values, in every layer that runs from the same state.

    Attributes:
        states: [rows, hidden], the residual stream where they left it.
        positions: [rows] int64.
        slot_mapping: [rows] int64.
    """

    states: Tensor
    positions: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """The tensors of one step, flat over its sequences.

    Attributes:
        token_ids: [tokens] int64.
        positions: [tokens] int64, 0-based in each sequence.
        slot_mapping: [tokens] int64, ``block * block_size + offset`` of each token's key and value.
        layout: where each sequence lies.
        sources: where each token's source lies in the cache, every token being a sequence of its
            own whose one query sees all of it; None for a decoder-only model.
        copied: rows of these sequences, before their tokens, whose keys and values are written
            first in each layer.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    layout: SequenceLayout
    sources: SequenceLayout | None = None
    copied: CopiedRows | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def first(self, num_seqs: int) -> ForwardBatch:
        """The batch of the first ``num_seqs`` sequences: views, no copies."""
        if num_seqs == len(self.layout.query_lens):
            return self
        layout = self.layout.first(num_seqs)
        num_tokens = layout.query_starts[-1]
        return ForwardBatch(
            self.token_ids[:num_tokens],
            self.positions[:num_tokens],
            self.slot_mapping[:num_tokens],
            layout,
            None if self.sources is None else self.sources.first(num_tokens),
        )

    def by_token(self, batch: ScheduledBatch, block_size: int) -> ForwardBatch:
        """The same for a cache whose blocks hold one token each.

        There the key and value of a row that stands aside have a slot of their own, although all
        that it sees lies where its sequence's others see it.

        Args:
            batch: what this was built of, every item that stands aside of one row.
            block_size: tokens of the blocks that the sequences own.
        """
        layout = self.layout.by_token(block_size)
        slots = self.slot_mapping.clone()
        rows, places, own = [], [], []
        for place, item in enumerate(batch.scheduled):
            if item.aside is not None:
                rows.append(layout.query_starts[place])
                places.append([place, item.start])
                own.append(slot_of(item.sequence.block_table, item.aside, block_size))
        if own:
            device = slots.device
            found = to_device(own, device, torch.int64)
            slots[to_device(rows, device)] = found
            at, column = to_device(places, device).unbind(1)
            layout.block_tables[at, column] = found.int()
        sources = None if self.sources is None else self.sources.by_token(block_size)
        return replace(self, slot_mapping=slots, layout=layout, sources=sources)

    @classmethod
    def build(cls, batch: ScheduledBatch, block_size: int, device: torch.device) -> ForwardBatch:
        """Lay the scheduled sequences out flat and copy the result to the device.

        Rows beyond a sequence's tokens get token 0: their tokens are known on the device only.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for item in batch.scheduled:
            table = item.sequence.block_table
            tokens += item.sequence.token_ids[item.start : item.stop]
            tokens += [0] * (item.stop - max(item.start, len(item.sequence.token_ids)))
            positions += item.positions
            slots += [slot_of(table, p, block_size) for p in item.positions]

        def on_device(values: list[int]) -> Tensor:
            return to_device(values, device, torch.int64)

        return cls(
            on_device(tokens),
            on_device(positions),
            on_device(slots),
            SequenceLayout.build(
                [item.num_tokens for item in batch.scheduled],
                [item.stop for item in batch.scheduled],
                [item.sequence.block_table for item in batch.scheduled],
                block_size,
                device,
            ),
            cls.sources_of(batch.scheduled, block_size, device),
        )

    @staticmethod
    def sources_of(
        items: Iterable[ScheduledSequence], block_size: int, device: torch.device
    ) -> SequenceLayout | None:
        """The ``sources`` of items' rows."""
        rows = [item.sequence for item in items for _ in range(item.num_tokens)]
        if not rows[0].source_table:
            return None
        return SequenceLayout.build(
            [1] * len(rows),
            [len(sequence.request.source_token_ids) for sequence in rows],
            [sequence.source_table for sequence in rows],
            block_size,
            device,
        )


def slot_of(table: list[int], place: int, block_size: int) -> int:
    """Where the cache has a place of a block table."""
    return table[place // block_size] * block_size + place % block_size
