"""What rough logits make certain of a row's distribution, given how far off they can be.

Host data and small tensors; knows nothing of how logits became rough, or of who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from multiexit_engine.ops.heads import HeadStatistics

# "surprise" is the best token's -log p
Quantity: TypeAlias = Literal["max_prob", "margin", "entropy", "surprise"]

# More than what log-probabilities, sums of float32 numbers, are off.
_ROUNDING = 2.0**-15


def certain_rows(
    found: HeadStatistics,
    errors: Tensor,
    quantities: Sequence[Quantity],
    thresholds: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Which rows pass, and which do not, whatever logits lie this near to the rough ones.

    Probabilities and margins pass where they are at least the threshold, "entropy" and "surprise"
    where they are at most that.

    Args:
        found: of the rough logits.
        errors: [rows] float64, how far any logit of a row is from its rough one.
        quantities: of each row.
        thresholds: of each row.

    Returns:
        Two [rows] bool tensors; a row in neither needs the exact logits, as one with NaN does.
    """
    limits = torch.tensor(thresholds, dtype=torch.float64)
    sure, unsure = torch.zeros(2, len(quantities), dtype=torch.bool)
    for kind in sorted(set(quantities)):
        low, high = _range_of(kind, found, errors)
        at_most = kind in ("entropy", "surprise")
        own_sure = high <= limits if at_most else low >= limits
        own_unsure = low > limits if at_most else high < limits
        own = torch.tensor([each == kind for each in quantities])
        sure, unsure = sure | own & own_sure, unsure | own & own_unsure
    is_known = errors.isfinite() & found.entropy.isfinite()
    return sure & is_known, unsure & is_known


def lone_best_tokens(found: HeadStatistics, errors: Tensor) -> Tensor:
    """[rows] bool: whether the best token of rough logits is that of all logits this near to them.

    No other one reaches it where the runner-up is more than twice the error below it.

    Args:
        found: of the rough logits.
        errors: [rows] float64, how far any of them is from the others.
    """
    lead = found.log_probs.double() - found.second_log_probs.double()
    return lead > 2 * errors + _ROUNDING


def _range_of(kind: Quantity, found: HeadStatistics, errors: Tensor) -> tuple[Tensor, Tensor]:
    """[rows] float64 each: between what a quantity is, if logits are within the errors.

    With every logit x within e of its rough one, and m the greatest of a row: (1 - p) / p of a
    token is the sum of exp(x' - x) over the others, of which each stays within a factor exp(w) with
    w = 2e, so the logit of every p moves by at most w, and so does that of the greatest p and of
    the second one. On the straight way from the rough logits to the others the entropy H changes by
    dH = -sum p dx (x - E x), and E |x - E x| <= 2 E (m - x) = 2 D. Each p stays within a factor
    exp(w) and each m - x within w, so D <= exp(u) (D' + u) where the way is u / w done, and
    |H - H'| is at most the integral from u = 0 to w of exp(u) (D' + u).
    """
    wide = 2 * errors
    lowest, highest = _probability(found.log_probs, wide)
    if kind == "max_prob":
        return lowest, highest
    if kind == "surprise":
        return -_log(highest), -_log(lowest)
    if kind == "margin":
        second_lowest, second_highest = _probability(found.second_log_probs, wide)
        return lowest - second_highest, highest - second_lowest
    entropy = found.entropy.double()
    drop = (entropy + found.log_probs.double()).clamp_min(0.0)
    change = drop * wide.expm1() + (wide - 1) * _exp(wide) + 1
    # log-probabilities are rounded, by far less than logits may be off
    change = change + wide / 16
    # no entropy is below that of a row whose tokens all have its greatest probability
    return torch.maximum(entropy - change, -_log(highest)), entropy + change


def _probability(log_probs: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest that a probability can be whose logit moves by so much."""
    surprise, factor = -log_probs.double(), _exp(wide)
    lowest = 1 / (1 + (surprise + _ROUNDING).clamp_min(0.0).expm1() * factor)
    highest = 1 / (1 + (surprise - _ROUNDING).clamp_min(0.0).expm1() / factor)
    return lowest * (1 - _ROUNDING), highest * (1 + _ROUNDING)


# PyTorch's `exp` and `log` of some hundred numbers wake its threads, which then spin beside the
# kernels; these do not.
def _exp(x: Tensor) -> Tensor:
    return x.expm1() + 1


def _log(x: Tensor) -> Tensor:
    return (x - 1).log1p()
