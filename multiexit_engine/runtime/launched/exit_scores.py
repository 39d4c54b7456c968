"""Given tokens scored by the exits that their rows choose, all decided on the device.

Rows of prompts run through all layers; each is asked at every exit afterwards, and the first that
is sure of it gives its distribution. Knows nothing of layers that run, or of the memory of pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multiexit_engine.layers.exit_heads import ExitHeads, Head, HeadOperands
from multiexit_engine.modes import EarlyExit
from multiexit_engine.ops import ExitProgress, ExitRules, head_logits
from multiexit_engine.ops.exit_rows import MEASURES
from multiexit_engine.request import ScoredToken
from multiexit_engine.runtime.launched.exit_memory import float32_threshold
from multiexit_engine.runtime.launched.exit_plan import exit_ways, looked_at
from multiexit_engine.runtime.launched.exit_questions import ask_exit
from multiexit_engine.runtime.rows.choosing import MAX_LOGIT_ROWS
from multiexit_engine.runtime.rows.chosen_rows import Coming
from multiexit_engine.runtime.rows.given_tokens import score_tokens
from multiexit_engine.runtime.rows.logit_rows import LogitRow
from multiexit_engine.runtime.rows.logit_slices import StatesAtLayer
from multiexit_engine.transfer import to_device


class ExitScores:
    """Rows of a step that score with the exit that each chooses.

    Args:
        heads: of the model.
        rows: all of modes that choose, none more than ``MAX_LOGIT_ROWS``.
        layers_of: of each of their modes the layers at which it asks.

    Attributes:
        layers: after which their states are looked at; 0 for the embeddings.
    """

    def __init__(
        self,
        heads: ExitHeads,
        rows: Sequence[LogitRow],
        layers_of: Mapping[EarlyExit, frozenset[int]],
    ) -> None:
        self._heads = heads
        self._rows = rows
        self._modes = [row.mode for row in rows if isinstance(row.mode, EarlyExit)]
        assert len(self._modes) == len(rows), "only these choose"
        self._layers_of = layers_of
        self._states: dict[int, Tensor] = {}
        self.layers = looked_at(layers_of) | {heads.original.layer}

    def keep(self, layer: int, flight: StatesAtLayer) -> None:
        """Take the states of the rows after a layer, where they are looked at."""
        if layer in self.layers:
            found = flight.rows_of([(row.item, row.position) for row in self._rows])
            assert None not in found, "rows of prompts run through all layers"
            self._states[layer] = flight.take([row for row in found if row is not None])

    def score(self) -> Coming[ScoredToken]:
        """The score of each row's given token; nobody waits for it here."""
        return score_tokens(self._rows, self._scores())

    def _scores(self) -> Tensor:
        """[rows, vocab] float32: raw scores by the exits that the rows choose."""
        original = self._heads.operands(self._heads.original, self._states[self._last])
        rules, progress = self._rules(), self._progress()
        heads, hidden = [(0, original)], original.hidden
        for layer, question in exit_ways(self._layers_of, False, True).questions:
            before = self._states[layer - 1] if question.compares else None
            state, here = self._states[layer], self._asks(layer)
            read = ask_exit(self._heads, layer, question, state, before, here, rules, progress)
            hidden = torch.where((progress.left == layer)[:, None], read, hidden)
            heads.append((layer, self._heads.operands(Head(layer), state[:1])))
        chosen = [(layer, own._replace(hidden=hidden)) for layer, own in heads]
        return _of_matrices(chosen, progress)

    @property
    def _last(self) -> int:
        return self._heads.original.layer

    @property
    def _device(self) -> torch.device:
        return self._states[self._last].device

    def _asks(self, layer: int) -> Tensor:
        """[rows] uint8: whether each row's mode asks at a layer."""
        asks = [layer in self._layers_of[mode] for mode in self._modes]
        return to_device([int(each) for each in asks], self._device, torch.uint8)

    def _rules(self) -> ExitRules:
        modes, device = self._modes, self._device
        return ExitRules(
            to_device([MEASURES.index(mode.measure) for mode in modes], device, torch.int32),
            to_device([float32_threshold(mode) for mode in modes], device, torch.float32),
            to_device([mode.shortlist or 0 for mode in modes], device, torch.int32),
        )

    def _progress(self) -> ExitProgress:
        count, device = len(self._rows), self._device
        left, streaks, is_read, passed = torch.zeros(4, count, dtype=torch.int32, device=device)
        values = torch.full((count,), math.nan, device=device)
        tokens = torch.full((count,), -1, dtype=torch.int64, device=device)
        return ExitProgress(left, values, tokens, streaks, is_read, passed)


def exit_scores(
    heads: ExitHeads,
    rows: Sequence[LogitRow],
    layers_of: Mapping[EarlyExit, frozenset[int]],
) -> list[ExitScores]:
    """Those of some rows that choose, a limited number in each."""
    own = [row for row in rows if isinstance(row.mode, EarlyExit)]
    starts = range(0, len(own), MAX_LOGIT_ROWS)
    return [ExitScores(heads, own[start : start + MAX_LOGIT_ROWS], layers_of) for start in starts]


def _of_matrices(heads: Sequence[tuple[int, HeadOperands]], progress: ExitProgress) -> Tensor:
    """[rows, vocab] float32: the logits of the head of the layer that each row left at.

    Args:
        heads: by layer, 0 for who left nowhere; those with one matrix are read once.
        progress: of the rows.
    """
    by_matrix: dict[tuple[int, int], tuple[HeadOperands, Tensor]] = {}
    for layer, operands in heads:
        key, is_here = (id(operands.weight), id(operands.bias)), progress.left == layer
        if key in by_matrix:
            is_here = is_here | by_matrix[key][1]
        by_matrix[key] = operands, is_here
    (first, _), *others = by_matrix.values()
    scores = head_logits(*first)
    for operands, is_here in others:
        scores = torch.where(is_here[:, None], head_logits(*operands), scores)
    return scores
