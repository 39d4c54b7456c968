"""One batch of non-autoregressive answers, computed row by row only where rows still go on.

Rows of all answers lie packed. A row that left keeps its state; the layers above make only its key
and value, and none where its whole answer has left. Joins the model's pieces and the rules of
exits; knows nothing of requests or queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from multiexit_engine.decoding.certainty import certain_rows, lone_best_tokens
from multiexit_engine.decoding.forecasts import GateRules, can_gain, rows_to_test
from multiexit_engine.decoding.parallel import (
    rows_to_refine,
    sure_rows,
    tested_layers,
)
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.layers.rough_heads import FEW_TESTED, exact_best_tokens
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.ops import (
    PackedSources,
    PackedTexts,
    head_logits,
    head_statistics,
    take_rows,
)
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.runtime.parallel.answers import Answer, LayerRows
from multiexit_engine.transfer import to_device, to_host


class ParallelBatch:
    """Answers to packed sources: ``run`` computes them, and refines those that ask for it.

    Args:
        model: whose answers they are.
        sources: token ids, at least one each.
        answers: in the order of their sources, one or more for each.
        rows: counts the work.
    """

    def __init__(
        self,
        model: ElmerModel,
        sources: Sequence[Sequence[int]],
        answers: Sequence[Answer],
        rows: LayerRows,
    ) -> None:
        self._model = model
        self._answers = answers
        self._rows = rows
        self._num_layers = model.config.num_layers
        self._source_lens = [len(source) for source in sources]
        self._owner = [i for i, answer in enumerate(answers) for _ in range(answer.length)]
        self._position = [place for answer in answers for place in range(answer.length)]
        self._first = list(accumulate((a.length for a in answers[:-1]), initial=0))
        self._exit_layers = [0] * len(self._owner)
        self._tested = [tested_layers(answer.mode, self._num_layers) for answer in answers]
        self._untested: list[int] = []
        self._cross: _Cross | None = None
        self._embedded, self._attended = _starts(model, [answer.length for answer in answers])
        self._prepare(sources)

    def _prepare(self, sources: Sequence[Sequence[int]]) -> None:
        """Read the sources, and have room for the rows."""
        flat = [token for source in sources for token in source]
        device, num_rows = self._embedded.device, len(self._owner)
        self._encoded = self._model.encode(to_device(flat, device), self._source_lens)
        self._hidden = self._embedded
        self._token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(num_rows, device=device)

    def run(self) -> None:
        """Compute every answer, its further passes included."""
        self._pass(list(range(len(self._owner))), is_first=True)
        for turn in range(1, max(answer.mode.refine for answer in self._answers) + 1):
            again = self._rows_of_turn(turn)
            if again:
                self._begin_again(again)
                self._pass(again, is_first=False)

    def logits(self) -> Tensor:
        """[rows, vocab] float32, of every position where it left; after ``run``."""
        return head_logits(*self._model.predict(self._hidden))

    def _begin_again(self, rows: list[int]) -> None:
        index = self._index(rows)
        begun = take_rows(self._embedded, index).to(self._hidden.dtype)
        self._hidden.index_copy_(0, index, begun)

    def _pass(self, rows: list[int], *, is_first: bool) -> None:
        self._cross = None
        layer = 0
        while rows:
            stop = self._next_stop(layer, rows)
            self._feed_back(layer, rows)
            self._run(range(layer, stop), rows, is_attended=is_first and layer == 0)
            rows = self._leave(stop, rows)
            layer = stop
        self._read_untested()
        self._hand_out(*to_host([self._token_ids, self._log_probs]))

    def _next_stop(self, layer: int, rows: list[int]) -> int:
        """The next layer, from 1-based ``layer`` on, after which rows may leave or are fed back."""
        return self._sure_depth(layer, rows, to_next=True)

    def _run(self, span: range, rows: list[int], *, is_attended: bool) -> None:
        """Advance ``rows`` by some layers; all others of their answers give keys and values."""
        counts = self._counts(rows)
        num_keyed = sum(a.length for a, n in zip(self._answers, counts, strict=True) if n)
        for layer in span:
            self._rows.computed[layer] += len(rows)
            self._rows.keyed[layer] += 0 if is_attended and layer == 0 else num_keyed
        cross = self._cross_at(span.start, counts, rows)
        keys_values = cross.keys_values[:, span.start - cross.start : span.stop - cross.start]
        sources = PackedSources(
            keys_values,
            [self._source_lens[source] for source in cross.sources],
            self._per_source(counts, cross.sources),
        )
        is_all = len(rows) == len(self._owner)
        texts = PackedTexts(
            [answer.length for answer in self._answers],
            counts,
            None if is_all else self._index(rows),
        )
        hidden = self._attended if is_attended else self._hidden
        self._hidden = self._model.run(hidden, span, texts, sources, is_attended=is_attended)

    def _feed_back(self, layer: int, rows: list[int]) -> None:
        """Give soft rows what they predict so far, without the bias, as ELMER does."""
        soft = [row for row in rows if self._mode(row).exit == "soft"]
        if layer == 0 or not soft:
            return
        hidden = self._states(soft)
        operands = self._model.predict(hidden)
        token_ids, _ = self._model.heads.rough.best_tokens(operands.hidden, operands.weight, None)
        mixed = self._model.feed_back(operands.hidden, token_ids).to(hidden.dtype)
        if len(soft) == len(self._owner):
            self._hidden = mixed
        else:
            self._hidden.index_copy_(0, self._index(soft), mixed)

    def _cross_at(self, layer: int, counts: list[int], rows: list[int]) -> _Cross:
        """Keys and values of the sources for a layer; for several at once where all will run."""
        cross = self._cross
        if cross is None or layer >= cross.stop:
            sources = sorted({a.source for a, n in zip(self._answers, counts, strict=True) if n})
            stop = self._sure_depth(layer, rows)
            if layer and all(mode.gate_chance is not None for mode in self._modes(rows)):
                # most likely they go on: one product for all layers costs less than one for each
                stop = self._num_layers
            encoded = self._encoded
            if len(sources) < len(self._source_lens):
                starts = list(accumulate(self._source_lens, initial=0))
                kept = [row for s in sources for row in range(starts[s], starts[s + 1])]
                encoded = take_rows(encoded, self._index(kept))
            keys_values = self._model.cross_span(encoded, range(layer, stop))
            cross = self._cross = _Cross(keys_values, layer, stop, sources)
        return cross

    def _sure_depth(self, layer: int, rows: list[int], *, to_next: bool = False) -> int:
        """The layer that all answers are certain to reach, from 0-based ``layer`` on.

        With ``to_next`` where the next row leaves, or all are fed back, before that.
        """
        counts = enumerate(self._counts(rows))
        return min(self._depth_of(i, layer, n, to_next=to_next) for i, n in counts if n)

    def _depth_of(self, i: int, layer: int, num_rows: int, *, to_next: bool) -> int:
        """``_sure_depth`` of an answer of which so many rows go on."""
        mode, last = self._answers[i].mode, self._num_layers
        if mode.exit == "soft" and to_next:
            return layer + 1
        if mode.exit == "prescribed" and mode.layers is not None:
            # the deepest row of an answer needs them all
            deeper = [each for each in mode.layers if each > layer]
            return min(deeper) if to_next else max(deeper)
        config, later = self._model.config, [k for k in self._tested[i] if k > layer]
        return min((k for k in later if can_gain(mode, config, num_rows, last - k)), default=last)

    def _modes(self, rows: list[int]) -> list[Parallel]:
        """Of the answers that rows belong to."""
        return [self._answers[i].mode for i in sorted({self._owner[row] for row in rows})]

    def _leave(self, layer: int, rows: list[int]) -> list[int]:
        """Let rows leave after a 1-based layer; gives those that go on."""
        if layer == self._num_layers:
            left = set(rows)
        else:
            left = {row for row in rows if self._prescribed(row) == layer}
        self._untested += sorted(left)
        tested = [
            row for row in rows if row not in left and layer in self._tested[self._owner[row]]
        ]
        tested = self._promising(layer, tested)
        self._rows.tested[layer - 1] += len(tested)
        for has_bias in (True, False) if tested else ():
            asked = [row for row in tested if self._mode(row).gate_bias == has_bias]
            for is_fine in (False, True):
                certain, asked = self._certain(asked, has_bias=has_bias, is_fine=is_fine)
                left.update(certain)
            left.update(self._sure(asked, has_bias=has_bias))
        for row in left:
            self._exit_layers[row] = layer
        return [row for row in rows if row not in left]

    def _promising(self, layer: int, rows: list[int]) -> list[int]:
        """Those of the rows that probes do not hold back."""
        probed = [row for row in rows if self._mode(row).gate_chance is not None]
        if not probed:
            return rows
        normed = self._model.predict(self._states(probed)).hidden
        rules, owners = self._gate_rules, self._owners
        if len(probed) < len(self._owner):
            index = self._index(probed)
            rules, owners = rules.some(index), owners.index_select(0, index)
        odds = self._model.gates.odds(layer, normed, rules.thresholds, rules.by_entropy)
        above = self._num_layers - layer
        kept = rows_to_test(odds, rules, None, owners, len(self._answers), above)
        held = {row for row, yes in zip(probed, kept.tolist(), strict=True) if not yes}
        return [row for row in rows if row not in held]

    def _certain(
        self, rows: list[int], *, has_bias: bool, is_fine: bool
    ) -> tuple[list[int], list[int]]:
        """Rows that leave whatever rough logits lack, and those of which these do not tell.

        Where the rough logits name the tokens of the former, too, these are read no more.
        """
        if not rows:
            return [], []
        reading = self._model.heads.rough.statistics(
            *self._gate_operands(rows, has_bias=has_bias),
            num_terms=2 if is_fine or len(rows) <= FEW_TESTED else 1,
            is_fine=is_fine,
        )
        if reading is None:
            return [], rows
        modes = [self._mode(row) for row in rows]
        thresholds = [mode.threshold for mode in modes if mode.threshold is not None]
        is_sure, is_unsure = certain_rows(*reading, [mode.measure for mode in modes], thresholds)
        is_told = is_sure & lone_best_tokens(*reading)
        sure = self._let_go(rows, is_sure, is_told, reading.found.tokens, has_bias=has_bias)
        is_open = (~is_sure & ~is_unsure).tolist()
        return sure, [row for row, left in zip(rows, is_open, strict=True) if left]

    def _sure(self, rows: list[int], *, has_bias: bool) -> list[int]:
        """Those of the rows that leave by their exact logits."""
        if not rows:
            return []
        found = head_statistics(*self._gate_operands(rows, has_bias=has_bias))
        is_sure = sure_rows(found, [self._mode(row) for row in rows])
        return self._let_go(rows, is_sure, is_sure, found.tokens, has_bias=has_bias)

    def _gate_operands(self, rows: list[int], *, has_bias: bool) -> HeadOperands:
        operands = self._model.predict(self._states(rows))
        return operands if has_bias else operands._replace(bias=None)

    def _let_go(
        self, rows: list[int], is_sure: Tensor, is_told: Tensor, tokens: Tensor, *, has_bias: bool
    ) -> list[int]:
        """The sure rows, of which those told have their tokens, if logits without bias tell any.

        Log-probabilities come from one product for all, whoever let a row go: bits of a result do
        not depend on what codes make of it.
        """
        sure = [row for row, yes in zip(rows, is_sure.tolist(), strict=True) if yes]
        tells = has_bias or not self._model.heads.has_bias
        places = [
            place
            for place, (row, told) in enumerate(zip(rows, is_told.tolist(), strict=True))
            if told and tells and not self._answers[self._owner[row]].has_log_probs
        ]
        taken = [rows[place] for place in places]
        if places:
            self._token_ids[self._index(taken)] = tokens[self._index(places)]
        self._untested += set(sure) - set(taken)
        return sure

    def _read_untested(self) -> None:
        """The tokens of all rows that left without a test that told them.

        One product for those that need log-probabilities, too, and one for the others.
        """
        rows, self._untested = sorted(self._untested), []
        for find, has_log_probs in (
            (exact_best_tokens, True),
            (self._model.heads.rough.best_tokens, False),
        ):
            own = [r for r in rows if self._answers[self._owner[r]].has_log_probs == has_log_probs]
            if own:
                index = self._index(own)
                found = find(*self._model.predict(self._states(own)))
                self._token_ids[index], self._log_probs[index] = found

    def _hand_out(self, token_ids: list[int], log_probs: list[float]) -> None:
        for i, answer in enumerate(self._answers):
            own = slice(self._first[i], self._first[i] + answer.length)
            answer.token_ids = token_ids[own]
            answer.log_probs = log_probs[own]
            answer.exit_layers = self._exit_layers[own]

    def _rows_of_turn(self, turn: int) -> list[int]:
        rows: list[int] = []
        for i, answer in enumerate(self._answers):
            if turn <= answer.mode.refine:
                places = rows_to_refine(answer.log_probs, turn, answer.mode.refine)
                rows += [self._first[i] + place for place in places]
        return rows

    @cached_property
    def _gate_rules(self) -> GateRules:
        """Of all rows."""
        modes = [self._mode(row) for row in range(len(self._owner))]
        return GateRules.of(modes, self._model.config, self._hidden.device)

    @cached_property
    def _owners(self) -> Tensor:
        """[rows] int64, the answer of each row."""
        return self._index(self._owner)

    def _prescribed(self, row: int) -> int | None:
        mode = self._mode(row)
        if mode.exit != "prescribed" or mode.layers is None:
            return None
        return mode.layers[self._position[row]]

    def _mode(self, row: int) -> Parallel:
        return self._answers[self._owner[row]].mode

    def _counts(self, rows: list[int]) -> list[int]:
        counts = [0] * len(self._answers)
        for row in rows:
            counts[self._owner[row]] += 1
        return counts

    def _per_source(self, counts: list[int], sources: Sequence[int]) -> list[int]:
        found = dict.fromkeys(sources, 0)
        for answer, count in zip(self._answers, counts, strict=True):
            if count:
                found[answer.source] += count
        return list(found.values())

    def _states(self, rows: list[int]) -> Tensor:
        """[rows, hidden] of some rows."""
        is_all = len(rows) == len(self._owner)
        return self._hidden if is_all else take_rows(self._hidden, self._index(rows))

    def _index(self, rows: list[int]) -> Tensor:
        return to_device(rows, self._embedded.device, torch.int64)


def _starts(model: ElmerModel, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What ``model.start`` gives for each length, one behind the other."""
    kinds = sorted(set(lengths))
    starts = [model.start(length) for length in kinds]
    first = dict(zip(kinds, accumulate(kinds, initial=0), strict=False))
    rows = [first[length] + place for length in lengths for place in range(length)]
    embedded = torch.cat([start.embedded for start in starts])
    attended = torch.cat([start.attended for start in starts])
    index = to_device(rows, embedded.device, torch.int64)
    return take_rows(embedded, index), take_rows(attended, index)


@dataclass(frozen=True)
class _Cross:
    """Keys and values of some sources for the 0-based layers ``start`` to ``stop - 1``."""

    keys_values: Tensor
    start: int
    stop: int
    sources: list[int]
