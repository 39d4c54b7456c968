"""Non-autoregressive answers whose rows leave as the device decides, with one wait for each pass.

The host launches every layer for whoever may still be there; which rows those are, stays on the
device until the pass has ended. Joins the model's pieces and the rules of exits; knows nothing of
requests or queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.decoding.forecasts import rows_to_test
from multiexit_engine.decoding.parallel import is_sure, tested_layers
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.ops import (
    RaggedSources,
    RaggedTexts,
    RowList,
    compact_rows,
    listed_head_statistics,
)
from multiexit_engine.runtime.parallel.answers import Answer, LayerRows
from multiexit_engine.runtime.parallel.parallel_pass import ParallelBatch
from multiexit_engine.transfer import to_device, to_host


def new_batch(
    model: ElmerModel,
    sources: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    rows: LayerRows,
) -> ParallelBatch:
    """The batch that waits least; its arguments are those of ``ParallelBatch``."""
    has_tests = any(answer.mode.exit == "confidence" for answer in answers)
    if has_tests and model.are_waits_spared(model.start(1).embedded):
        return RaggedBatch(model, sources, answers, rows)
    return ParallelBatch(model, sources, answers, rows)


class RaggedBatch(ParallelBatch):
    """``ParallelBatch`` on a device whose decisions the host does not wait for."""

    def __init__(
        self,
        model: ElmerModel,
        sources: Sequence[Sequence[int]],
        answers: Sequence[Answer],
        rows: LayerRows,
    ) -> None:
        super().__init__(model, sources, answers, rows)
        self._packing = _Packing.of(
            [answer.length for answer in answers],
            self._source_lens,
            [answer.source for answer in answers],
            self._hidden.device,
        )
        modes = [self._mode(row) for row in range(len(self._owner))]
        device = self._hidden.device
        self._thresholds = to_device(
            [mode.threshold or 0.0 for mode in modes], device, torch.float32
        )
        self._by_entropy = to_device([mode.measure == "entropy" for mode in modes], device)
        self._probed_layers = {
            layer
            for answer in answers
            if answer.mode.gate_chance is not None
            for layer in tested_layers(answer.mode, self._num_layers)
        }

    def _pass(self, rows: list[int], *, is_first: bool) -> None:
        self._cross = None
        layer = self._next_stop(0, rows)
        self._run(range(layer), rows, is_attended=is_first)
        rules = [self._rules(row) for row in rows]
        plan = _Plan.of(rules, rows, len(self._owner), self._num_layers, self._hidden.device)
        found = _Found.new(plan.computed, self._exit_layers)
        counts: list[tuple[range, RaggedTexts]] = []
        tests: list[tuple[int, RowList]] = []
        while True:
            found = self._leave_ragged(layer, plan, found, tests)
            rows = [row for row in rows if (self._prescribed(row) or self._num_layers) > layer]
            if layer == self._num_layers or not rows:
                break
            stop = self._next_stop(layer, rows)
            self._feed_back(layer, rows)
            counts.append((range(layer, stop), self._run_ragged(range(layer, stop), found.goes_on)))
            layer = stop
        self._read_unread(found.is_unread)
        self._end(found.exit_layers, counts, tests)

    def _rules(self, row: int) -> _Rules:
        mode = self._mode(row)
        leaves = self._prescribed(row) or self._num_layers
        return _Rules(leaves, tested_layers(mode, self._num_layers), mode.gate_bias)

    def _run_ragged(self, span: range, goes_on: Tensor) -> RaggedTexts:
        """Advance whoever goes on by some layers; gives who that is."""
        packing = self._packing
        texts = RaggedTexts.of(goes_on, packing.starts, packing.owners)
        query_starts = texts.rows.before[packing.first_rows]
        is_read = query_starts[1:] > query_starts[:-1]
        listed = compact_rows(is_read[packing.source_owners])
        keys_values = self._model.cross_span(self._encoded, span, listed)
        sources = RaggedSources(keys_values, packing.source_starts, query_starts)
        self._hidden = self._model.run_ragged(self._hidden, span, texts, sources)
        return texts

    def _leave_ragged(
        self, layer: int, plan: _Plan, found: _Found, tests: list[tuple[int, RowList]]
    ) -> _Found:
        """Let rows leave after a 1-based layer; adds to ``tests`` which were tested there."""
        by_plan = found.goes_on & plan.leaves[layer]
        is_unread, left = found.is_unread | by_plan, by_plan
        operands = self._model.predict(self._hidden)
        is_open = self._promising_marks(layer, found.goes_on, operands.hidden)
        for marks, bias in ((plan.tested, operands.bias), (plan.tested_without_bias, None)):
            if layer not in marks:
                continue
            asked = is_open & marks[layer]
            listed = compact_rows(asked)
            tests.append((layer, listed))
            numbers = listed_head_statistics(operands.hidden, operands.weight, bias, listed)
            sure = asked & is_sure(numbers, self._thresholds, self._by_entropy)
            left = left | sure
            if marks is plan.tested:
                self._take(sure, numbers.tokens, numbers.log_probs)
            else:
                is_unread = is_unread | sure
        exit_layers = found.exit_layers.masked_fill(left, layer)
        return _Found(found.goes_on & ~left, is_unread, exit_layers)

    def _promising_marks(self, layer: int, goes_on: Tensor, normed: Tensor) -> Tensor:
        """[rows] bool: those that go on and that probes do not hold back from a test."""
        if layer not in self._probed_layers:
            return goes_on
        rules, above = self._gate_rules, self._num_layers - layer
        odds = self._model.gates.odds(layer, normed, rules.thresholds, rules.by_entropy)
        return rows_to_test(odds, rules, goes_on, self._owners, len(self._answers), above)

    def _read_unread(self, is_unread: Tensor) -> None:
        """The tokens of all rows that left without a test of the logits that give them."""
        operands = self._model.predict(self._hidden)
        found = listed_head_statistics(*operands, compact_rows(is_unread))
        self._take(is_unread, found.tokens, found.log_probs)

    def _take(self, which: Tensor, tokens: Tensor, log_probs: Tensor) -> None:
        self._token_ids = torch.where(which, tokens, self._token_ids)
        self._log_probs = torch.where(which, log_probs.to(self._log_probs.dtype), self._log_probs)

    def _end(
        self,
        exit_layers: Tensor,
        counts: list[tuple[range, RaggedTexts]],
        tests: list[tuple[int, RowList]],
    ) -> None:
        """Wait for the device, once, and tell what it found and did."""
        lists: list[RowList] = [each for _, texts in counts for each in (texts.rows, texts.keyed)]
        lists += [listed for _, listed in tests]
        numbers = torch.cat([exit_layers[:0], *(each.count for each in lists)])
        results = to_host([self._token_ids, self._log_probs, exit_layers, numbers])
        token_ids, log_probs, self._exit_layers, amounts = results
        pairs = amounts[: 2 * len(counts)]
        for (layer, _), tested in zip(tests, amounts[len(pairs) :], strict=True):
            self._rows.tested[layer - 1] += tested
        for (span, _), computed, keyed in zip(counts, pairs[::2], pairs[1::2], strict=True):
            for layer in span:
                self._rows.computed[layer] += computed
                self._rows.keyed[layer] += keyed
        self._hand_out(token_ids, log_probs)


class _Found(NamedTuple):
    """What the device knows of the rows between two layers, [rows] each.

    Attributes:
        goes_on: whether a row does.
        is_unread: whether it left, and its token has still to be read.
        exit_layers: int32, 1-based, where it left.
    """

    goes_on: Tensor
    is_unread: Tensor
    exit_layers: Tensor

    @classmethod
    def new(cls, computed: Tensor, exit_layers: list[int]) -> _Found:
        before = to_device(exit_layers, computed.device, torch.int32)
        return cls(computed, torch.zeros_like(computed), before)


class _Rules(NamedTuple):
    """Where a row leaves: after a layer at the latest, and after some if it is sure."""

    leaves: int
    tested: tuple[int, ...]
    has_bias: bool


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the host knows of a pass, on the device; bools of rows.

    Attributes:
        computed: [rows], those of this pass.
        leaves: [layers + 1, rows], those that leave after a 1-based layer whatever they predict.
        tested: by layer, the rows [rows] whose logits are asked there.
        tested_without_bias: likewise, where a gate does not count the logits' bias.
    """

    computed: Tensor
    leaves: Tensor
    tested: dict[int, Tensor]
    tested_without_bias: dict[int, Tensor]

    @classmethod
    def of(
        cls,
        rules: Sequence[_Rules],
        rows: Sequence[int],
        num_rows: int,
        num_layers: int,
        device: torch.device,
    ) -> _Plan:
        """For the rules of some of all rows."""
        count = num_layers + 1
        # one copy to the device: all leave, are tested, are tested without bias, layer by layer
        marks = torch.zeros(3, count, num_rows, dtype=torch.bool)
        for rule, row in zip(rules, rows, strict=True):
            marks[0, rule.leaves, row] = True
            for layer in rule.tested:
                marks[1 if rule.has_bias else 2, layer, row] = True
        is_asked = marks.any(2).tolist()
        leaves, *tests = to_device(marks, device)
        with_bias, without = (
            {layer: test[layer] for layer in range(count) if is_asked[kind][layer]}
            for kind, test in enumerate(tests, start=1)
        )
        return cls(leaves.any(0), leaves, with_bias, without)


@dataclass(frozen=True, eq=False)
class _Packing:
    """How answers and sources lie, on the device.

    Attributes:
        starts: [answers + 1] int32, where the rows of each answer begin.
        owners: [rows] int64, the answer of each row.
        source_starts: [sources + 1] int32, where the tokens of each source begin.
        source_owners: [tokens] int64, the source of each token.
        first_rows: [sources + 1] int64, where the rows that read each source begin.
    """

    starts: Tensor
    owners: Tensor
    source_starts: Tensor
    source_owners: Tensor
    first_rows: Tensor

    @classmethod
    def of(
        cls,
        lens: Sequence[int],
        source_lens: Sequence[int],
        sources: Sequence[int],
        device: torch.device,
    ) -> _Packing:
        """From the lengths of answers and sources, and the source of each answer, ascending."""
        rows_of_source = [0] * len(source_lens)
        for length, source in zip(lens, sources, strict=True):
            rows_of_source[source] += length
        return cls(
            to_device(_starts(lens), device, torch.int32),
            to_device(_owners(lens), device, torch.int64),
            to_device(_starts(source_lens), device, torch.int32),
            to_device(_owners(source_lens), device, torch.int64),
            to_device(_starts(rows_of_source), device, torch.int64),
        )


def _starts(lens: Sequence[int]) -> list[int]:
    return list(accumulate(lens, initial=0))


def _owners(lens: Sequence[int]) -> list[int]:
    return [owner for owner, count in enumerate(lens) for _ in range(count)]
