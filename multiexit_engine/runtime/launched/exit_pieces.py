"""The pieces of steps whose rows choose their exit on the device: nobody is told before the end.

All rows of a step lie in one stream of states. A span of layers lists those that go on, computes
them and asks the exit at its end; the others keep the states in which they left. What a piece does
depends on its key and on the memories' contents alone. Knows nothing of sequences or of queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.ops import ListedRows, rows_beyond
from multiexit_engine.runtime.device.graph_parts import only_if
from multiexit_engine.runtime.device.graphs import Pieces
from multiexit_engine.runtime.drafts.draft_rounds import NumKeys
from multiexit_engine.runtime.launched.decode_memory import DecodeMemory
from multiexit_engine.runtime.launched.decode_pieces import DecodePieces
from multiexit_engine.runtime.launched.exit_memory import ExitMemory
from multiexit_engine.runtime.launched.exit_questions import Question, ask_exit
from multiexit_engine.runtime.launched.exit_tokens import ExitTokens
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes
from multiexit_engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class ExitWays:
    """What a step's rows need beside their layers: hashable, as a part of pieces' keys.

    Attributes:
        questions: by layer, what is asked there; ascending.
        keeps_heads: what the exits' heads would read is kept, for rows whose tokens no measure
            tells.
        has_waiting: some rows begin where they waited.
        has_copied: some of them may only give keys and values.
    """

    questions: tuple[tuple[int, Question], ...]
    keeps_heads: bool
    has_waiting: bool
    has_copied: bool


class _Span(NamedTuple):
    """What a piece of layers does: its key.

    Attributes:
        start: layers before it.
        stop: layers up to its end.
        size: rows, padding included.
        num_own: the first of them, which may be asked.
        bound: of keys.
        question: what is asked behind it, if anything.
        keeps_heads: see ``ExitWays``.
        takes_waiting: some rows begin where they waited; of the first span.
        has_copied: see ``ExitWays``.
    """

    start: int
    stop: int
    size: int
    num_own: int
    bound: NumKeys
    question: Question | None
    keeps_heads: bool
    takes_waiting: bool
    has_copied: bool


class ExitPieces:
    """Runs the pieces of such steps of one model.

    Args:
        model: the decoder.
        kv_cache: of the model.
        states: where rows wait.
        memory: the rows' inputs and results.
        exits: what is to be known besides.
        rows: the pieces of other steps, in whose memory states lie.
        tokens: chooses tokens of rows that have gone as far as they go.
        pieces: how pieces run.
        spare_slot: of the cache, that nobody owns.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        states: ExitStates,
        memory: DecodeMemory,
        exits: ExitMemory,
        rows: DecodePieces,
        tokens: ExitTokens,
        pieces: Pieces,
        spare_slot: int,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._exit_states = states
        self._memory = memory
        self._exits = exits
        self._rows = rows
        self._tokens = tokens
        self._pieces = pieces
        self._spare_slot = spare_slot

    @property
    def bounds(self) -> Sequence[NumKeys]:
        """Numbers of keys that pieces may be captured for."""
        return self._rows.bounds

    def run_layers(
        self,
        layers: Sequence[int],
        ways: ExitWays,
        size: int,
        num_own: int,
        num_keys: NumKeys,
    ) -> None:
        """Run layers, or those of them that anybody is left for.

        Args:
            layers: how many ran before, and then those to stop after, ascending.
            ways: what the rows need.
            size: rows, padding included.
            num_own: the first of them, which may be asked.
            num_keys: of the longest contexts.
        """
        bound, questions = self._rows.bound(num_keys), dict(ways.questions)
        for start, stop in pairwise(layers):
            span = _Span(
                start, stop, size, num_own, bound, questions.get(stop), ways.keeps_heads,
                ways.has_waiting and not start, ways.has_copied,
            )  # fmt: skip
            self._pieces.run(("exit layers", span), num_own, partial(self._run, span))

    def keep(self, last: int, size: int, num_own: int) -> None:
        """Keep the states of rows after the last layer: those that left will go on from them."""
        self._pieces.run(("exit states", size), num_own, partial(self._keep, last, size))

    def choose(self, num_own: int, ways: ExitWays, wishes: HeadWishes | None) -> None:
        """Choose the tokens of the first rows, which have gone as far as they go.

        Args:
            num_own: how many.
            ways: what they need.
            wishes: of those that want more than the best token; None where none does.
        """
        exits = tuple(layer for layer, _ in ways.questions)
        what = exits, ways.keeps_heads, wishes
        call = partial(self._tokens.choose, slice(num_own), *what)
        self._pieces.run(("exit tokens", num_own, *what), num_own, call, is_short=True)

    def choose_at_ends(self, rows: slice, ways: ExitWays, wishes: HeadWishes | None) -> None:
        """The same for rows whose layers ran elsewhere, which are asked at all exits now."""
        for layer, question in ways.questions:
            self._ask(rows, layer, question, ways.keeps_heads)
        exits = [layer for layer, _ in ways.questions]
        self._tokens.choose(rows, exits, ways.keeps_heads, wishes)

    def scores(self, rows: Sequence[int], ways: ExitWays) -> Tensor:
        """[rows, vocab] float32: raw scores of rows by the exits that they chose."""
        own = to_device(rows, self._kv_cache.device)
        return self._tokens.scores(own, [layer for layer, _ in ways.questions])

    def _run(self, span: _Span) -> None:
        """Run a span of layers on those of the first rows that go on, and ask the exit behind."""
        start, stop, size = span.start, span.stop, span.size
        inputs, rows = self._memory.inputs, slice(size)
        hidden = self._rows.states(start)[rows] if start else self._enter(rows, span.takes_waiting)
        paths = self._exits.paths(rows)
        running, copied = rows_beyond(self._exits.progress(rows).left, start, paths)
        every = slice(None)
        forward = self._rows.forward(rows, size, inputs["tokens"][rows], every, span.bound)
        listed = ListedRows(
            running, copied if span.has_copied else None, paths.owners, self._spare_slot
        )
        counts = [each.count for each in (listed.running, listed.copied) if each is not None]
        # whoever left keeps the state in which it did
        with only_if(*counts, otherwise=partial(self._put, stop, rows, hidden)):
            self._put(stop, rows, self._model.run_listed(
                hidden, start, stop, self._kv_cache, forward, listed
            ))  # fmt: skip
        if span.question is not None:
            self._ask(slice(span.num_own), stop, span.question, span.keeps_heads)

    def _put(self, layer: int, rows: slice, hidden: Tensor) -> None:
        self._rows.states_after(layer, hidden)[rows] = hidden

    def _enter(self, rows: slice, has_waiting: bool) -> Tensor:
        """[rows, hidden]: the embeddings of new rows, and the states of those that waited."""
        if has_waiting:
            self._exits.settle(rows)
        self._exits.begin()
        inputs = self._memory.inputs
        hidden = self._model.embed(self._rows.tokens(rows), inputs["positions"][rows])
        # what the first layer's output may be compared with
        self._rows.states_after(0, hidden)[rows] = hidden
        if not has_waiting:
            return hidden
        kept = self._exit_states.take(inputs["slots"][rows])
        is_new = self._exits.inputs["joins"][rows] == 0
        return torch.where(is_new[:, None], hidden.to(kept.dtype), kept)

    def _keep(self, last: int, size: int) -> None:
        rows = slice(size)
        self._exit_states.keep(self._memory.inputs["slots"][rows], self._rows.states(last)[rows])

    def _ask(self, rows: slice, layer: int, question: Question, keeps_heads: bool) -> None:
        rules, progress = self._exits.rules(rows), self._exits.progress(rows)
        here, tap = self._exits.inputs["asks"][layer][rows], self._rows.states(layer)[rows]
        before = self._rows.states(layer - 1)[rows] if question.compares else None
        what = layer, question, tap, before, here, rules, progress
        hidden = ask_exit(self._model.heads, *what)
        if keeps_heads:
            self._tokens.keep(rows, progress.left == layer, hidden)
