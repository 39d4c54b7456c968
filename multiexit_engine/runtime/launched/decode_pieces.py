"""The pieces that plain decode steps are made of, over memory that stays where it is.

Spans of layers from one exit that somebody reads to the next, then heads. What a piece does depends
on its key and on the memory's contents alone, so that it can be captured as a graph. Knows nothing
of sequences, of queues, or of which rows a step has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.batch import ForwardBatch, SequenceLayout
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.decoding.plan import HeadGroup, Segment
from multiexit_engine.layers.exit_heads import Head, HeadOperands
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.ops import head_tokens
from multiexit_engine.ops.tokens import RowGroup
from multiexit_engine.runtime.device.graphs import Pieces
from multiexit_engine.runtime.drafts.draft_rounds import NumKeys
from multiexit_engine.runtime.launched.decode_memory import DecodeMemory
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes, WishedTokens


class _Part(NamedTuple):
    """Rows with the same heads.

    Attributes:
        place: of the list of these rows in memory; None for the first rows of the step.
        upper: their head.
        lower: what it is contrasted with, if anything.
        size: how many, padding included.
    """

    place: int | None
    upper: Head
    lower: Head | None
    size: int


class DecodePieces:
    """Runs the pieces of steps of one decoder.

    Args:
        model: the decoder.
        kv_cache: of the model.
        memory: the rows' inputs and results.
        tokens: chooses tokens of these rows.
        pieces: how pieces run.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        memory: DecodeMemory,
        tokens: WishedTokens,
        pieces: Pieces,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._memory = memory
        self._wished = tokens
        self._pieces = pieces
        num_rows = memory.spare_row + 1
        self._starts = torch.arange(num_rows + 1, dtype=torch.int32, device=kv_cache.device)
        # the states after each layer where a span of layers ends
        self._states: dict[int, Tensor] = {}
        self._matrices: dict[Head, tuple[int, int]] = {}

    @property
    def sizes(self) -> Sequence[int]:
        """Numbers of rows that pieces may be captured for."""
        return self._pieces.sizes

    @property
    def bounds(self) -> Sequence[NumKeys]:
        """Numbers of keys that pieces may be captured for."""
        most = self._memory.most_keys
        own, source = (sorted({min(each, limit) for each in self._pieces.bounds}) for limit in most)
        return [NumKeys(*pair) for pair in product(own, source)]

    def bound(self, num_keys: NumKeys) -> NumKeys:
        """Keys to provide for when the longest contexts have so many."""
        pairs = zip(num_keys, self._memory.most_keys, strict=True)
        return NumKeys(*(count and min(self._pieces.bound(count), most) for count, most in pairs))

    def size(self, num_rows: int) -> int:
        """Rows to run for so many, padding included."""
        return self._pieces.size(num_rows)

    def states(self, layer: int) -> Tensor:
        """[rows of the memory, hidden]: what the rows that ran so far have after a layer."""
        return self._states[layer]

    def put_states(self, layer: int, rows: Tensor, states: Tensor) -> None:
        """Take states [n, hidden] after a layer, which others computed, for rows [n] int64."""
        self.states_after(layer, states).index_copy_(0, rows, states)

    def run_layers(
        self, segments: Sequence[Segment], num_keys: NumKeys, batch: int, first: int = 0
    ) -> None:
        """Run segments of layers on rows of the memory.

        Args:
            segments: without gaps.
            num_keys: of the longest contexts.
            batch: sequences of the step, padding included.
            first: of the rows.
        """
        bound = self.bound(num_keys)
        for segment in segments:
            # rows that have left may stand where padding would: what they write nobody reads
            size = self._pieces.size(segment.num_seqs)
            span = segment.start, segment.stop, first, size, bound
            self._pieces.run(("layers", *span), batch, partial(self._span, *span))

    def draft(self, head: Head, num_tokens: int, first: int, size: int, batch: int) -> None:
        """Draft with an exit, for rows that only want the best token or one by temperature.

        Args:
            head: of the exit.
            num_tokens: how many tokens of the vocabulary are looked at.
            first: of the rows.
            size: how many rows, padding included.
            batch: sequences of the step, padding included.
        """
        what = head, num_tokens, first, size
        self._pieces.run(("draft", *what), batch, partial(self._draft, *what), is_short=True)

    def note_latest(self, batch: int) -> None:
        """Let edits count the tokens that only the device knows, before others take their places.

        Args:
            batch: sequences of the step, padding included.
        """
        self._pieces.run(("latest",), batch, self._wished.note_latest, is_short=True)

    def choose(
        self, groups: Sequence[HeadGroup], batch: int, are_listed: bool, wishes: HeadWishes
    ) -> None:
        """Choose the tokens of rows with plain heads.

        Args:
            batch: sequences of the step, padding included.
            groups: rows with the same heads.
            are_listed: whether the memory lists the rows of each group; else there is one group, of
                the first rows.
            wishes: of these rows.
        """
        for parts in self._by_matrix(groups, are_listed):
            call = partial(self._choose, parts, wishes)
            self._pieces.run(("heads", parts, wishes), batch, call, is_short=True)

    def _span(self, start: int, stop: int, first: int, size: int, bound: NumKeys) -> None:
        """Run a span of layers on ``size`` rows, from the memory of states to it."""
        inputs, rows = self._memory.inputs, slice(first, first + size)
        tokens = inputs["tokens"][rows] if start else self.tokens(rows)
        forward = self.forward(rows, size, tokens, rows, bound)
        embed = self._model.embed
        hidden = self._states[start][rows] if start else embed(tokens, forward.positions)
        hidden = self._model.run_layers(
            hidden, start, stop, self._kv_cache, forward, self._model.read_behind(stop)
        )
        self.states_after(stop, hidden)[rows] = hidden

    def forward(
        self, rows: slice, size: int, tokens: Tensor, tables: slice, bound: NumKeys
    ) -> ForwardBatch:
        """What layers are told of rows of the memory, each a sequence of its own.

        Args:
            rows: of the memory.
            size: how many.
            tokens: [rows] int64.
            tables: the rows of the block tables.
            bound: of keys.
        """
        inputs = self._memory.inputs

        def layout(num_keys: int, contexts: str, name: str) -> SequenceLayout:
            return SequenceLayout(
                query_lens=(1,) * size,
                context_lens=(num_keys,) * size,
                cu_query_lens=self._starts[: size + 1],
                context_lens_device=inputs[contexts][rows],
                block_tables=inputs[name][tables],
                has_bounds=True,
            )

        return ForwardBatch(
            tokens,
            inputs["positions"][rows],
            inputs["slots"][rows],
            layout(bound.own, "contexts", "tables"),
            layout(bound.source, "source_lens", "source_tables") if bound.source else None,
        )

    def states_after(self, layer: int, like: Tensor) -> Tensor:
        """[rows of the memory, hidden]: where states after a layer lie, in the type of some."""
        if layer not in self._states:
            self._states[layer] = like.new_zeros(self._memory.spare_row + 1, like.shape[1])
        return self._states[layer]

    def tokens(self, rows: slice) -> Tensor:
        """[rows] int64: from the host, or where only the device knows them from there."""
        known = self._memory.inputs["tokens"][rows]
        chosen_by = self._memory.inputs["chosen_by"][rows]
        # only rounds of drafts begin elsewhere than at the first row
        found = self._memory.results["drafts" if rows.start else "tokens"]
        chosen = found[chosen_by.clamp(min=0)]
        # whatever a row of NaN chose is embedded before the host hears of it
        chosen = chosen.clamp(0, self._model.config.vocab_size - 1)
        return torch.where(chosen_by < 0, known, chosen)

    def _by_matrix(self, groups: Sequence[HeadGroup], are_listed: bool) -> list[tuple[_Part, ...]]:
        """The groups of rows, those together whose upper heads have one matrix."""
        found: dict[tuple[int, int], list[_Part]] = {}
        for place, group in enumerate(groups):
            own = place if are_listed else None
            part = _Part(own, group.upper, group.lower, self._pieces.size(len(group.rows)))
            found.setdefault(self._matrix(group.upper), []).append(part)
        return [tuple(parts) for parts in found.values()]

    def _matrix(self, head: Head) -> tuple[int, int]:
        """What is the same for heads with the same matrix and bias."""
        if head not in self._matrices:
            operands = self._model.heads.operands(head, self._states[head.layer][:1])
            self._matrices[head] = id(operands.weight), id(operands.bias)
        return self._matrices[head]

    def _draft(self, head: Head, num_tokens: int, first: int, size: int) -> None:
        inputs, rows = self._memory.inputs, slice(first, first + size)
        operands = self._operands(head, rows).first(num_tokens)
        draws = inputs["temperatures"][rows], inputs["seeds"][rows], inputs["counts"][rows]
        self._memory.results["drafts"][rows] = head_tokens(*operands, *draws)[0]

    def _choose(self, parts: tuple[_Part, ...], wishes: HeadWishes) -> None:
        """Choose tokens of the rows of groups whose heads have one matrix, which is read once."""
        rows = [self._rows_of(part) for part in parts]
        own = rows[0] if len(parts) == 1 else torch.cat([r for r in rows if isinstance(r, Tensor)])
        pairs = list(zip(parts, rows, strict=True))
        uppers = [self._operands(part.upper, place) for part, place in pairs]
        lowers = [part.lower and self._operands(part.lower, place) for part, place in pairs]
        upper = uppers[0]
        if len(parts) > 1:
            upper = upper._replace(hidden=torch.cat([one.hidden for one in uppers]))
        groups = [RowGroup(p.size, *(low or ())) for p, low in zip(parts, lowers, strict=True)]
        for name, found in self._wished.choose(own, upper, groups, wishes).items():
            self._memory.results[name][own] = found

    def _rows_of(self, part: _Part) -> Tensor | slice:
        if part.place is None:
            return slice(part.size)
        return self._memory.inputs["groups"][part.place][: part.size]

    def _operands(self, head: Head, rows: Tensor | slice) -> HeadOperands:
        return self._model.heads.operands(head, self._states[head.layer][rows])
