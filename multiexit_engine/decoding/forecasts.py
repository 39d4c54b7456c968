"""Whether exact tests are worth making, by forecasts of what they would find.

Knows the measures of ``Parallel`` and their scales; nothing of models, or of how forecasts learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.probes import chances_of
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.transfer import to_device

# beyond these a measure is as good as certain, and its scale would have no end
_LEAST_ENTROPY = 1e-3
_GREATEST_LOG_PROB = -1e-4
# Chances are added up as whole numbers of so many: sums that no order changes.
_ONE = 1 << 16


class GateRules(NamedTuple):
    """What rows ask of their forecasts, [rows] each.

    Attributes:
        thresholds: float32, of the row's measure, on the scale of forecasts.
        by_entropy: bool, whether the measure is the entropy.
        least: float32, log-odds of the least chance at which the row is tested; -inf for rows that
            are tested in any case.
        gains: int64, ``least_gain`` of the row's mode.
    """

    thresholds: Tensor
    by_entropy: Tensor
    least: Tensor
    gains: Tensor

    @classmethod
    def of(cls, modes: Sequence[Parallel], config: ModelConfig, device: torch.device) -> GateRules:
        """Of the mode of each row."""
        return cls(
            to_device([gate_threshold(mode) for mode in modes], device, torch.float32),
            to_device([mode.measure == "entropy" for mode in modes], device, torch.bool),
            to_device([gate_least(mode) for mode in modes], device, torch.float32),
            to_device([least_gain(mode, config) for mode in modes], device, torch.int64),
        )

    def some(self, index: Tensor) -> GateRules:
        """Those of some rows, [rows] int64."""
        return GateRules(*(part.index_select(0, index) for part in self))


def rows_to_test(
    odds: Tensor,
    rules: GateRules,
    asked: Tensor | None,
    owners: Tensor,
    num_answers: int,
    num_layers_above: int,
) -> Tensor:
    """[rows] bool: those with their least chance of passing, in answers that can expect their gain.

    What an answer can expect is the sum over these rows of the chance times the layers above. A
    function of the answer alone. What is no number is not tested.

    Args:
        odds: [rows] float32, of ``GateProbes.odds``.
        rules: of the rows.
        asked: [rows] bool, those whose mode tests here and that go on; None for all.
        owners: [rows] int64, the answer of each row.
        num_answers: there are at most.
        num_layers_above: layers that a row which leaves here is spared.
    """
    kept = odds >= rules.least
    if asked is not None:
        kept = kept & asked
    chances = (chances_of(odds) * _ONE).long().masked_fill(~kept, 0)
    sums = chances.new_zeros(num_answers).index_add_(0, owners, chances)
    return kept & (sums.index_select(0, owners) * num_layers_above >= rules.gains)


def foretold(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """[..., 2]: what forecasts are about, of the best token's log-probability and the entropy."""
    best = log_probs.clamp_max(_GREATEST_LOG_PROB)
    odds = best - torch.log(-torch.expm1(best))
    return torch.stack([odds, entropy.clamp_min(_LEAST_ENTROPY).log()], -1)


def gate_threshold(mode: Parallel) -> float:
    """On the scale of ``foretold``; infinite where every row passes, or none."""
    threshold = mode.threshold
    if threshold is None:
        return 0.0
    if mode.measure == "entropy":
        return -math.inf if threshold < 0 else math.log(max(threshold, _LEAST_ENTROPY))
    if threshold <= 0 or threshold > 1:
        return -math.inf if threshold <= 0 else math.inf
    best = min(math.log(threshold), _GREATEST_LOG_PROB)
    return best - math.log(-math.expm1(best))


def gate_least(mode: Parallel) -> float:
    """Log-odds of the least chance at which a mode tests; -inf where it tests in any case."""
    chance = mode.gate_chance
    return -math.inf if chance is None else math.log(chance) - math.log1p(-chance)


def least_gain(mode: Parallel, config: ModelConfig) -> int:
    """Layers of a position that an answer has to expect from its tests at a layer, in 2^-16."""
    if mode.gate_chance is None:
        return 0
    gain = config.vocab_size / config.hidden_size
    return math.ceil(_ONE * (gain if mode.gate_gain is None else mode.gate_gain))


def can_gain(mode: Parallel, config: ModelConfig, num_rows: int, num_layers_above: int) -> bool:
    """Whether so many positions of an answer could be tested if each were certain to leave."""
    return num_rows * num_layers_above * _ONE >= least_gain(mode, config)
