"""Non-autoregressive answers in captured pieces: a pass launches graphs, and waits once.

Lays the rows of a batch out in the memory of the pieces, and says which of these run. Joins the
rules of exits and the pieces; knows nothing of how a piece computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from multiexit_engine.decoding.parallel import tested_layers
from multiexit_engine.models.elmer import KEPT_STARTS, ElmerModel
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.runtime.parallel.answer_memory import AnswerRow, Lens
from multiexit_engine.runtime.parallel.answer_pieces import AnswerPieces, AnswerSpan
from multiexit_engine.runtime.parallel.answers import Answer, LayerRows
from multiexit_engine.runtime.parallel.parallel_pass import ParallelBatch
from multiexit_engine.transfer import wait_for


class CapturedBatch(ParallelBatch):
    """``ParallelBatch`` whose passes are captured.

    Args:
        model: whose answers they are.
        sources: token ids, at least one each.
        answers: in the order of their sources, one or more for each.
        rows: counts the work.
        pieces: run the passes; they fit.
    """

    def __init__(
        self,
        model: ElmerModel,
        sources: Sequence[Sequence[int]],
        answers: Sequence[Answer],
        rows: LayerRows,
        pieces: AnswerPieces,
    ) -> None:
        self._pieces = pieces
        super().__init__(model, sources, answers, rows)

    def _prepare(self, sources: Sequence[Sequence[int]]) -> None:
        memory, num_rows = self._pieces.memory, len(self._owner)
        self._lens = Lens(
            self._source_lens,
            [answer.length for answer in self._answers],
            [answer.source for answer in self._answers],
        )
        self._size = self._pieces.size(num_rows)
        self._num_tokens = self._pieces.bound(sum(self._source_lens))
        self._hidden = memory.states[:num_rows]
        memory.send_sources(sources)
        self._begin_at(self._attended)

    def _begin_again(self, rows: list[int]) -> None:
        self._begin_at(self._embedded)

    def _begin_at(self, states: Tensor) -> None:
        self._pieces.memory.begun[: len(states)].copy_(states)

    def _pass(self, rows: list[int], *, is_first: bool) -> None:
        memory, pieces, going = self._pieces.memory, self._pieces, set(rows)
        every = range(len(self._owner))
        memory.send(self._lens, [self._row(r) if r in going else None for r in every], self._size)
        if is_first:
            pieces.encode(self._num_tokens)
        pieces.begin()
        deepest = max(self._leaves(row) for row in rows)
        modes = {self._mode(row) for row in rows}
        for span in spans_of(modes, deepest, self._num_layers, self._size, is_first=is_first):
            pieces.run_span(span, self._num_tokens)
        pieces.choose(self._size)
        memory.fetch()
        wait_for(self._embedded.device)
        self._read()

    def _row(self, row: int) -> AnswerRow:
        tested = self._tested[self._owner[row]]
        return AnswerRow(self._mode(row), self._leaves(row), tested)

    def _leaves(self, row: int) -> int:
        return self._prescribed(row) or self._num_layers

    def _read(self) -> None:
        """What the pass found and did, which was waited for."""
        memory, num_rows, work = self._pieces.memory, len(self._owner), self._rows
        for counts, name in (
            (work.computed, "computed"),
            (work.keyed, "keyed"),
            (work.tested, "tested"),
        ):
            for layer, count in enumerate(memory.found(name, self._num_layers)):
                counts[layer] += count
        found = (memory.found(n, num_rows) for n in ("tokens", "log_probs", "exit_layers"))
        token_ids, log_probs, self._exit_layers = found
        self._hand_out(token_ids, log_probs)


def spans_of(
    modes: Collection[Parallel], deepest: int, num_layers: int, size: int, *, is_first: bool
) -> Iterator[AnswerSpan]:
    """The spans of layers of a pass.

    Prescribed layers may be any, so where there are some the pass stops after every layer, not to
    have spans of its own for each list of them.

    Args:
        modes: of its rows.
        deepest: layers that somebody may run.
        num_layers: of the model.
        size: rows, padding included.
        is_first: whether it begins behind the first layer's self-attention.
    """
    tested = {mode: set(tested_layers(mode, num_layers)) for mode in modes}
    stops = {deepest}.union(*tested.values())
    if any(mode.exit in ("soft", "prescribed") for mode in modes):
        stops = set(range(1, deepest + 1))
    start, has_soft = 0, any(mode.exit == "soft" for mode in modes)
    for stop in sorted(stops):
        asking = [mode for mode in modes if stop in tested[mode]]
        yield AnswerSpan(
            start,
            stop,
            size,
            is_attended=is_first and not start,
            feeds_back=has_soft and start > 0,
            is_tested=any(mode.gate_bias for mode in asking),
            is_tested_plain=not all(mode.gate_bias for mode in asking),
            is_probed=any(mode.gate_chance is not None for mode in asking),
        )
        start = stop


def warm_up(model: ElmerModel, pieces: AnswerPieces, mode: Parallel) -> None:
    """Run every piece of passes in one mode once, on padding, so that all are captured."""
    num_layers = model.config.num_layers
    for length in range(1, min(KEPT_STARTS, pieces.sizes[-1]) + 1):
        model.start(length)
    for size in pieces.sizes:
        pieces.memory.send_sources([])
        pieces.memory.send(Lens((), (), ()), [], size)
        pieces.begin()
        pieces.choose(size)
        for bound in pieces.bounds:
            pieces.encode(bound)
            for is_first in (True, False) if mode.refine else (True,):
                spans = spans_of([mode], num_layers, num_layers, size, is_first=is_first)
                for span in spans:
                    pieces.run_span(span, bound)
        wait_for(pieces.memory.states.device)
