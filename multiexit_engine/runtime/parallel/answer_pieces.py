"""The pieces of captured passes of non-autoregressive answers, over memory that stays where it is.

Sources, spans of decoder layers from one stop to the next, and the tokens of rows that no test
told. What a piece does depends on its key and on the memory's contents alone. Knows nothing of
requests, or of which rows a pass has.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.decoding.forecasts import rows_to_test
from multiexit_engine.decoding.parallel import is_sure
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.ops import (
    RaggedSources,
    RaggedTexts,
    compact_rows,
    listed_head_statistics,
)
from multiexit_engine.ops.heads import HeadStatistics
from multiexit_engine.runtime.device.graph_parts import only_if
from multiexit_engine.runtime.device.graphs import Call, Pieces
from multiexit_engine.runtime.parallel.answer_memory import AnswerMemory


class AnswerSpan(NamedTuple):
    """What a piece of layers does: its key.

    Attributes:
        start: layers before it.
        stop: layers up to its end, after which rows leave.
        size: rows, padding included.
        is_attended: rows begin behind the first layer's self-attention.
        feeds_back: some rows are given what they predict, before the span.
        is_tested: some rows leave behind it if they are sure.
        is_tested_plain: likewise, by logits without their bias.
        is_probed: probes hold some of these back.
    """

    start: int
    stop: int
    size: int
    is_attended: bool
    feeds_back: bool
    is_tested: bool
    is_tested_plain: bool
    is_probed: bool


class AnswerPieces:
    """Runs the pieces of passes of one model.

    Args:
        model: whose answers they are.
        memory: the rows' inputs and results.
        pieces: how pieces run.
    """

    def __init__(self, model: ElmerModel, memory: AnswerMemory, pieces: Pieces) -> None:
        self._model = model
        self._pieces = pieces
        self.memory = memory

    @property
    def sizes(self) -> Sequence[int]:
        """Numbers of rows that pieces are captured for."""
        return self._pieces.sizes

    @property
    def bounds(self) -> Sequence[int]:
        """Numbers of tokens of sources that pieces are captured for."""
        return self._pieces.bounds

    def fits(self, num_rows: int, num_tokens: int) -> bool:
        """Whether passes of so many rows, over sources of so many tokens, are captured."""
        return num_rows <= self.sizes[-1] and num_tokens <= self.bounds[-1]

    def size(self, num_rows: int) -> int:
        """Rows to run for so many, padding included."""
        return self._pieces.size(num_rows)

    def bound(self, num_tokens: int) -> int:
        """Tokens to read for so many, padding included."""
        return self._pieces.bound(num_tokens)

    def encode(self, num_tokens: int) -> None:
        """Read the sources, of so many tokens with padding."""
        self._run(("sources", num_tokens), partial(self._encode, num_tokens))

    def begin(self) -> None:
        """Begin a pass."""
        self._run(("begin",), self._begin)

    def run_span(self, span: AnswerSpan, num_tokens: int) -> None:
        """Run a span of layers on those that go on, and let rows leave behind it.

        Args:
            span: which.
            num_tokens: of the sources, padding included.
        """
        cross = span.start, span.stop, num_tokens
        self._run(("sources of layers", *cross), partial(self._read_sources, *cross))
        self._run(("answer layers", span), partial(self._run_layers, span))

    def choose(self, size: int) -> None:
        """Find the tokens of all rows that left without a test that told them."""
        self._run(("answer tokens", size), partial(self._choose, slice(size)))

    def _run(self, key: Hashable, call: Call) -> None:
        self._pieces.run(key, 0, call)

    def _encode(self, num_tokens: int) -> None:
        memory, inputs, rows = self.memory, self.memory.inputs, slice(num_tokens)
        owners = inputs["source_owners"][rows]
        texts = RaggedTexts.of(owners < memory.num_texts, inputs["source_starts"], owners)
        tokens, places = inputs["tokens"][rows], inputs["places"][rows]
        memory.encoded[rows] = self._model.encoder.ragged(tokens, places, texts)

    def _begin(self) -> None:
        memory, computed = self.memory, self.memory.inputs["computed"]
        memory.goes_on.copy_(computed)
        memory.is_unread.zero_()
        memory.states.copy_(torch.where(computed[:, None], memory.begun, memory.states))
        for name in ("computed", "keyed", "tested"):
            memory.results[name].zero_()

    def _read_sources(self, start: int, stop: int, num_tokens: int) -> None:
        """Keys and values for a span, of the sources that somebody still reads."""
        memory, inputs, rows = self.memory, self.memory.inputs, slice(num_tokens)
        before = compact_rows(memory.goes_on).before[inputs["first_rows"]]
        is_read = before[1:] > before[:-1]
        listed = compact_rows(is_read[inputs["source_owners"][rows]])
        with only_if(listed.count):
            found = self._model.cross_span(memory.encoded[rows], range(start, stop), listed)
            memory.keys_values(stop - start)[rows] = found

    def _run_layers(self, span: AnswerSpan) -> None:
        memory, inputs, rows = self.memory, self.memory.inputs, slice(span.size)
        if span.feeds_back:
            self._feed_back(rows)
        starts = slice(memory.num_texts_of(span.size) + 2)
        goes_on, owners = memory.goes_on[rows], inputs["owners"][rows]
        texts = RaggedTexts.of(goes_on, inputs["starts"][starts], owners)
        sources = RaggedSources(
            memory.keys_values(span.stop - span.start),
            inputs["source_starts"][starts],
            texts.rows.before[inputs["first_rows"][starts]],
        )
        with only_if(texts.rows.count):
            memory.states[rows] = self._model.run_ragged(
                memory.states[rows],
                range(span.start, span.stop),
                texts,
                sources,
                is_attended=span.is_attended,
            )
        # as the host counts: nobody makes keys for a self-attention that is known
        keyed = slice(span.start + span.is_attended, span.stop)
        memory.results["computed"][span.start : span.stop] = texts.rows.count
        memory.results["keyed"][keyed] = texts.keyed.count
        self._leave(span, rows)

    def _feed_back(self, rows: slice) -> None:
        """Give soft rows what they predict so far, without the bias, as ELMER does."""
        memory = self.memory
        operands = self._model.predict(memory.states[rows])
        soft = memory.goes_on[rows] & memory.inputs["is_soft"][rows]
        listed = compact_rows(soft)
        found = listed_head_statistics(operands.hidden, operands.weight, None, listed)
        tokens = torch.where(soft, found.tokens, 0)
        mixed = self._model.feed_back(operands.hidden, tokens, listed)
        memory.states[rows] = torch.where(soft[:, None], mixed.float(), memory.states[rows])

    def _leave(self, span: AnswerSpan, rows: slice) -> None:
        """Let rows leave behind a span."""
        memory, inputs, layer = self.memory, self.memory.inputs, span.stop
        goes_on = memory.goes_on[rows]
        by_plan = goes_on & inputs["leaves"][layer][rows]
        left, is_unread = by_plan, memory.is_unread[rows] | by_plan
        if span.is_tested or span.is_tested_plain:
            operands = self._model.predict(memory.states[rows])
            is_open = goes_on
            if span.is_probed:
                is_open = self._rows_to_test(layer, operands.hidden, goes_on)
            if span.is_tested:
                asked = is_open & inputs["tested"][layer][rows]
                found, sure = self._test(layer, asked, operands)
                self._take(rows, sure, found)
                left = left | sure
            if span.is_tested_plain:
                asked = is_open & inputs["tested_plain"][layer][rows]
                _, sure = self._test(layer, asked, operands._replace(bias=None))
                left, is_unread = left | sure, is_unread | sure
        memory.is_unread[rows] = is_unread
        exit_layers = memory.results["exit_layers"]
        exit_layers[rows] = exit_layers[rows].masked_fill(left, layer)
        memory.goes_on[rows] = goes_on & ~left

    def _rows_to_test(self, layer: int, normed: Tensor, goes_on: Tensor) -> Tensor:
        """[rows] bool: those of whom probes find it worth while."""
        memory, rows = self.memory, slice(len(goes_on))
        rules, above = memory.gate_rules(rows), self._model.config.num_layers - layer
        odds = self._model.gates.odds(layer, normed, rules.thresholds, rules.by_entropy)
        owners = memory.inputs["owners"][rows]
        return rows_to_test(odds, rules, goes_on, owners, memory.num_texts + 1, above)

    def _test(
        self, layer: int, asked: Tensor, operands: HeadOperands
    ) -> tuple[HeadStatistics, Tensor]:
        """What the head says of the rows asked, and [rows] bool: which of them are sure."""
        inputs, rows = self.memory.inputs, slice(len(asked))
        listed = compact_rows(asked)
        self.memory.results["tested"][layer - 1] += listed.count[0]
        found = listed_head_statistics(*operands, listed)
        rules = inputs["thresholds"][rows], inputs["by_entropy"][rows]
        return found, asked & is_sure(found, *rules)

    def _take(self, rows: slice, which: Tensor, found: HeadStatistics) -> None:
        results = self.memory.results
        tokens, log_probs = found.tokens, found.log_probs.float()
        results["tokens"][rows] = torch.where(which, tokens, results["tokens"][rows])
        results["log_probs"][rows] = torch.where(which, log_probs, results["log_probs"][rows])

    def _choose(self, rows: slice) -> None:
        operands, is_unread = self._model.predict(self.memory.states[rows]), self.memory.is_unread
        found = listed_head_statistics(*operands, compact_rows(is_unread[rows]))
        self._take(rows, is_unread[rows], found)
