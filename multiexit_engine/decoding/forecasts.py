"""Whether an exact test is worth making, by a forecast of what it would find.

Knows the measures of ``Parallel`` and their scales; nothing of models, or of how forecasts learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.layers.gate_probes import Forecast
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.transfer import to_device

# beyond these a measure is as good as certain, and its scale would have no end
_LEAST_ENTROPY = 1e-3
_GREATEST_LOG_PROB = -1e-4
_LOG2_E = math.log2(math.e)


class GateRules(NamedTuple):
    """What rows ask of their forecasts, [rows] each.

    Attributes:
        thresholds: float32, of the row's measure, on the scale of forecasts.
        by_entropy: bool, whether the measure is the entropy.
        least: float32, log-odds of the least chance at which the row is tested; -inf for rows that
            are tested in any case.
    """

    thresholds: Tensor
    by_entropy: Tensor
    least: Tensor

    @classmethod
    def of(cls, modes: Sequence[Parallel], device: torch.device) -> GateRules:
        """Of the mode of each row."""
        return cls(
            to_device([gate_threshold(mode) for mode in modes], device, torch.float32),
            to_device([mode.measure == "entropy" for mode in modes], device, torch.bool),
            to_device([gate_least(mode) for mode in modes], device, torch.float32),
        )

    def some(self, index: Tensor) -> GateRules:
        """Those of some rows, [rows] int64."""
        return GateRules(*(part.index_select(0, index) for part in self))


def are_promising(forecast: Forecast, rules: GateRules) -> Tensor:
    """[rows] bool: whether each row has its least chance of passing the exact test.

    A function of the row alone. What is no number is not promising.
    """
    # Not exp, which on CPUs wakes PyTorch's threads: they spin for a while beside the kernels' own,
    # and the next layer of 256 rows takes a sixth longer.
    narrow = torch.exp2(-_LOG2_E * forecast.log_scales)
    above = (forecast.centres - rules.thresholds[:, None]) * narrow
    log_odds = torch.where(rules.by_entropy, -above[:, 1], above[:, 0])
    return log_odds >= rules.least


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
