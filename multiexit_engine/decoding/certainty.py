"""What rough logits make certain of a row's distribution, given how far off they can be.

Host data and small tensors; knows nothing of how logits became rough, or of who asks.

Some tokens of a row, the near ones, have exact logits; the others have rough ones. Let y be a logit
less the greatest exact one b, y' the rough y of another token, d what it lacks: y = y' + d. Known
are e >= |d| for every token, and s, no less than the length of the vector of all d.

- The normaliser Z = sum exp(y) is N + R with N of the near tokens and R = sum exp(y' + d). As exp
  is convex, R >= R' + sum exp(y') d, and by Taylor's formula R lies no more than
  exp(e) / 2 sum exp(y') d^2 above that. By Cauchy-Schwarz |sum exp(y') d| <= |exp(y')| s, and at
  most R' e; sum exp(y') d^2 is at most max exp(y') s^2, and R' e^2. Where thousands of tokens share
  the mass their errors nearly cancel: |exp(y')| s is a small part of R' e.
- The entropy is H = log Z - c - U / Z with U = sum exp(y) (y - c), for any c. With c the mean of y
  under the rough distribution U is 0 but for d. The slope of exp(y) (y - c) is exp(y) v with
  v = y - c + 1, and its curvature exp(y) (v + 1). So U changes by at most |exp(y') v| s and
  exp(e) / 2 sum exp(y') (|v| + 1 + e) d^2, or by the same sums with e for d. For |U| < Z both
  log Z + U / Z and log Z - U / Z grow with Z, so their ends are those of Z.
- The greatest probability is at least 1 / Z, of b; it is more than that only where another token
  can exceed b. So are the second one, and the difference of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from multiexit_engine.ops.rough_sums import LogitErrors, RoughSums

# "surprise" is the best token's -log p
Quantity: TypeAlias = Literal["max_prob", "margin", "entropy", "surprise"]

# More than what log-probabilities, sums of float32 numbers, are off.
_ROUNDING = 2.0**-15
# Beyond it nothing is certain, and exp stays a number.
_MOST_ERROR = 16.0


class _Bounds(NamedTuple):
    """[rows] float64 each.

    Attributes:
        lowest: of Z.
        highest: of Z.
        other: what exp(y) of a token that is not near can be at most.
    """

    lowest: Tensor
    highest: Tensor
    other: Tensor


def certain_rows(
    found: RoughSums,
    errors: LogitErrors,
    quantities: Sequence[Quantity],
    thresholds: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Which rows pass, and which do not, whatever logits lie this near to the rough ones.

    Probabilities and margins pass where they are at least the threshold, "entropy" and "surprise"
    where they are at most that.

    Args:
        found: of the rows.
        errors: of the rough logits.
        quantities: of each row.
        thresholds: of each row.

    Returns:
        Two [rows] bool tensors; a row in neither needs the exact logits, as one with NaN does.
    """
    limits = torch.tensor(thresholds, dtype=torch.float64)
    sure, unsure = torch.zeros(2, len(quantities), dtype=torch.bool)
    bounds = _bounds(found, errors)
    kinds = sorted(set(quantities))
    for kind in kinds:
        low, high = _range_of(kind, found, errors, bounds)
        at_most = kind in ("entropy", "surprise")
        own_sure = high <= limits if at_most else low >= limits
        own_unsure = low > limits if at_most else high < limits
        if len(kinds) > 1:
            own = torch.tensor([each == kind for each in quantities])
            own_sure, own_unsure = own & own_sure, own & own_unsure
        sure, unsure = sure | own_sure, unsure | own_unsure
    is_known = (errors.greatest <= _MOST_ERROR) & (bounds.highest < torch.inf)
    return sure & is_known, unsure & is_known


def lone_best_tokens(found: RoughSums, errors: LogitErrors) -> Tensor:
    """[rows] bool: whether ``found.tokens`` are the best ones, of equals the first.

    No token that is not near can reach the best of those that are.
    """
    return (found.border + errors.slacks < -_ROUNDING) & found.best.isfinite()


def _bounds(found: RoughSums, errors: LogitErrors) -> _Bounds:
    error, distance, rest = errors.greatest, errors.distances, found.rest_sum
    rough = found.near_sum + rest
    rounding = _ROUNDING * rough
    drift = torch.minimum(found.squares.sqrt() * distance, rest * error)
    curve, tallest = _curve(errors), _tallest(found)
    bend = curve * torch.minimum(tallest * distance.square(), rest * error.square())
    # e^0 of the best token is in the sum
    lowest = (rough - drift - rounding).clamp_min(1 - _ROUNDING)
    other = _exp((found.border + errors.slacks).clamp(-1e3, 1e2))
    return _Bounds(lowest, rough + drift + bend + rounding, other)


def _entropies(found: RoughSums, errors: LogitErrors, bounds: _Bounds) -> tuple[Tensor, Tensor]:
    """The least and the greatest."""
    rough = found.near_sum + found.rest_sum
    centre = (found.near_drops + found.rest_drops) / rough
    change = _change_of_drops(found, errors) + (2 * centre.abs() + 1) * _ROUNDING * rough
    least = _log(bounds.lowest) - centre - change / bounds.lowest
    most = _log(bounds.highest) - centre + change / bounds.highest
    # the exact entropy is rounded, too
    least, most = least - _ROUNDING * (1 + least.abs()), most + _ROUNDING * (1 + most.abs())
    is_small = change < bounds.lowest
    return least.where(is_small, -torch.inf), most.where(is_small, torch.inf)


def _curve(errors: LogitErrors) -> Tensor:
    """Half of what e widens the curve of exp by; nothing is known of rows with errors beyond."""
    return _exp(errors.greatest.clamp_max(_MOST_ERROR)) / 2


def _tallest(found: RoughSums) -> Tensor:
    """What exp(y') of a token that is not near is at most."""
    return _exp(found.border.clamp(-1e3, 1e2))


def _change_of_drops(found: RoughSums, errors: LogitErrors) -> Tensor:
    """How far U can be from 0."""
    error, distance, rest = errors.greatest, errors.distances, found.rest_sum
    turn = 1 - (found.near_drops + found.rest_drops) / (found.near_sum + rest)
    parts = found.squared_drops, 2 * turn * found.square_drops, turn.square() * found.squares
    # a difference of rounded numbers
    slack = 2.0**-16 * (parts[0] + parts[1].abs() + parts[2])
    squares = (parts[0] + parts[1] + parts[2]).clamp_min(0.0) + slack
    length = squares.sqrt()
    # of |v|: y' is below the border
    border = found.border.clamp_min(-1e3)
    sizes = rest * (border + (border + turn).abs()) - found.rest_drops
    drift = torch.minimum(length * distance, sizes * error)
    tall = (length + (error + 1) * _tallest(found)) * distance.square()
    wide = (sizes + (error + 1) * rest) * error.square()
    return drift + _curve(errors) * torch.minimum(tall, wide)


def _range_of(
    kind: Quantity, found: RoughSums, errors: LogitErrors, bounds: _Bounds
) -> tuple[Tensor, Tensor]:
    """[rows] float64 each: between what a quantity is."""
    if kind == "entropy":
        return _entropies(found, errors, bounds)
    greatest = bounds.other.clamp_min(1.0)
    lowest, highest = 1 / bounds.highest, greatest / bounds.lowest
    if kind == "margin":
        second = _exp(found.second.clamp_min(-1e3))
        gap = (1 - torch.maximum(second, bounds.other)).clamp_min(0.0)
        slack = _ROUNDING * highest
        return (gap / bounds.highest - slack).clamp_min(0.0), (
            greatest - second
        ) / bounds.lowest + slack
    lowest, highest = lowest * (1 - _ROUNDING), highest * (1 + _ROUNDING)
    return (lowest, highest) if kind == "max_prob" else (-_log(highest), -_log(lowest))


# PyTorch's `exp` and `log` of some hundred numbers wake its threads, which then spin beside the
# kernels; these do not.
def _exp(x: Tensor) -> Tensor:
    return x.expm1() + 1


def _log(x: Tensor) -> Tensor:
    return (x - 1).log1p()
