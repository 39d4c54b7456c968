"""The chance that a row passes an exit's test, as a small network foretells it.

Knows nothing of how the network learned, or of what follows from the chance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multiexit_engine.ops.linear import linear, linear_activation
from multiexit_engine.ops.operands import is_plain
from multiexit_engine.ops.registry import register_op

_LOG2_E = math.log2(math.e)


@register_op
def gate_odds(
    normed: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    thresholds: Tensor,
    by_entropy: Tensor,
) -> Tensor:
    """Log-odds of the chance that each row passes its threshold.

    The network gives a logistic distribution for each of two measures: what shall be at least the
    threshold, and, ``by_entropy``, what shall be at most that.

    Args:
        normed: [rows, hidden] float32.
        up: [units, hidden] float32, as the next three.
        up_bias: [units].
        down: [4, units]: the medians of both measures, then the logarithms of the scales.
        down_bias: [4].
        thresholds: [rows] float32, on the scale of the row's measure.
        by_entropy: [rows] bool.

    Returns:
        [rows] float32; a function of the row alone. NaN where a state has no number.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.5 (early-exit classifier), with one
        hidden layer and a distribution in place of a class.
    """
    inner = linear_activation(normed.float(), up, up_bias, "relu")
    centres, log_scales = linear(inner, down, down_bias).chunk(2, dim=1)
    above = (centres - thresholds[:, None]) * torch.exp2(-_LOG2_E * log_scales)
    return torch.where(by_entropy, -above[:, 1], above[:, 0])


gate_odds.backend(
    "cpu",
    "multiexit_engine._native:gate_odds",
    device="cpu",
    supports=lambda normed, up, *_, **__: is_plain(normed, up),
)
