"""What rough logits say of a head's distributions, and how far that can be from the exact ones.

Knows nothing of who asks, or of what is decided by the numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multiexit_engine.ops.coded_heads import (
    CodedHead,
    CodedHidden,
    LogitBounds,
    decoded_rows,
    logit_bounds,
    logit_roundings,
    rough_logits,
)
from multiexit_engine.ops.heads import head_logits
from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import register_op

# Tokens that have an upper end together, and how many such blocks have their greatest token near.
BLOCK, NEAR_BLOCKS = 64, 32
MOST_NEAR = BLOCK * NEAR_BLOCKS
# y below it counts for nothing
_LOWEST = -100.0
# Beyond it the spread of a head's codes would take seconds to find.
MOST_PRODUCTS = 1 << 37
# Rows whose squares are summed in float32.
_ROWS_AT_ONCE = 1024


class RoughSums(NamedTuple):
    """Of rows; ``y`` is a logit less the greatest exact one, near tokens have exact logits.

    Attributes:
        tokens: [rows] int64, the best of the near tokens.
        best: [rows] float64, as all that follow: its logit; NaN where nothing is known.
        second: of the second near token, less ``best``; -inf where there is none.
        near_sum: the sum of e^y over near tokens.
        near_drops: of e^y y.
        border: no rough y of another token is greater, its own error added; -inf where all tokens
            are near. What is slack in the bounds comes on top.
        rest_sum: the sum of e^y over the other tokens, y the rough one.
        rest_drops: of e^y y.
        squares: of e^2y.
        square_drops: of e^2y y.
        squared_drops: of e^2y y^2.
    """

    tokens: Tensor
    best: Tensor
    second: Tensor
    near_sum: Tensor
    near_drops: Tensor
    border: Tensor
    rest_sum: Tensor
    rest_drops: Tensor
    squares: Tensor
    square_drops: Tensor
    squared_drops: Tensor


class LogitErrors(NamedTuple):
    """How far rough logits can be from exact ones, [rows] float64 each; NaN where unknown.

    Attributes:
        greatest: of any logit.
        slacks: of it, what is not a token's own error.
        distances: of all logits of a row together, l2.
    """

    greatest: Tensor
    slacks: Tensor
    distances: Tensor


class HeadSpread(NamedTuple):
    """No less than the greatest singular values of a head's coded rows, columns divided by scales.

    Attributes:
        missing: of what the codes lack.
        codes: of the codes.
    """

    missing: float
    codes: float


def head_spread(weight: Tensor, head: CodedHead) -> HeadSpread:
    """Of a head and its codes; of very large ones the l2 norms of all numbers, which are greater.

    The squares are summed in float32, which is off by no more than n 2^-24 times all of them.
    """
    vocab, size = weight.shape
    whole = HeadSpread(float(head.errors.double().norm()), vocab**0.5 * head.size)
    if vocab * size**2 > MOST_PRODUCTS:
        return whole
    sums = torch.zeros(2, size, size, dtype=torch.float64)
    parts = torch.split(weight, _ROWS_AT_ONCE)
    for part, rows in zip(parts, decoded_rows(head, _ROWS_AT_ONCE), strict=True):
        coded = rows[: len(part), :size]
        missing = (part - head.mean) / head.columns - coded
        sums[0] += missing.T @ missing
        sums[1] += coded.T @ coded
    if not bool(sums.isfinite().all()):
        return whole
    greatest = torch.linalg.eigvalsh(sums)[:, -1].clamp_min(0.0).tolist()
    found = [
        (value + _ROWS_AT_ONCE * 2.0**-23 * norm**2) ** 0.5 + 2.0**-22 * whole.codes
        for value, norm in zip(greatest, whole, strict=True)
    ]
    return HeadSpread(*(min(pair) for pair in zip(found, whole, strict=True)))


def finer_spread(spread: HeadSpread, finer: CodedHead) -> HeadSpread:
    """Of a head whose spread is known, with its finer codes added."""
    missing = float(finer.errors.double().norm())
    return HeadSpread(missing, spread.codes + spread.missing + missing)


def logit_errors(
    states: CodedHidden, head: CodedHead, bias: Tensor | None, spread: HeadSpread | None = None
) -> LogitErrors:
    """How far the rough logits of a head's rows can be off.

    What a row's logits lack is ``F h + W' e``, with F what the head's codes lack, W' the codes, h
    the state and e what its codes lack: as a vector over all tokens no longer than the singular
    values allow. Rounding adds no more than its bound times the root of the number of tokens.

    Args:
        states: of the rows.
        head: whose logits they give.
        bias: of the logits, or None.
        spread: of the head; None where ``distances`` may be those of the greatest errors.
    """
    bounds = logit_bounds(states, head, bias)
    greatest = bounds.reaches.double() * head.error + bounds.slacks
    width = head.vocab**0.5
    if spread is None:
        return LogitErrors(greatest, bounds.slacks, greatest * width)
    coding = (
        states.norms * spread.missing + (states.errors + states.norms * 2.0**-23) * spread.codes
    )
    distances = coding * (1 + 2.0**-20) + logit_roundings(states, head, bias) * width
    return LogitErrors(greatest, bounds.slacks, distances)


@register_op
def rough_head_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: CodedHidden,
    head: CodedHead,
    bounds: LogitBounds,
    finer: CodedHead | None = None,
) -> RoughSums:
    """Sums over distributions of rough logits, but exact ones of the tokens that count most.

    Near are the tokens whose rough logit can reach the upper end of the 32nd of all blocks of 64
    consecutive tokens, the greatest upper ends first. What else is in the vocabulary counts with
    its rough logit.

    Args:
        hidden: [rows, hidden_size].
        weight: [vocab or more, hidden_size] of the same dtype.
        bias: [vocab] float32, or None.
        states: codes of ``hidden`` for the head.
        head: codes of the first ``head.vocab`` rows of ``weight``.
        bounds: of the rough logits.
        finer: of ``finer_head``, added to the head, with the errors of the sum; or None.

    Returns:
        RoughSums; NaN where a number is none, and of rows with more than 2048 near tokens.

    Source: products of 8-bit codes on both sides, Dettmers et al. 2022, arXiv:2208.07339, section
        2.1, by row.
    """
    logits, errors = rough_logits(states, head, bias), head.errors
    if finer is not None:
        logits, errors = logits + rough_logits(states, finer, None), finer.errors
    uppers = logits + bounds.reaches[:, None] * errors[: head.vocab]
    near = uppers >= _borders(uppers)[:, None]
    exact = head_logits(hidden, weight[: head.vocab], bias).double()
    exact = exact.masked_fill(~near, -torch.inf)
    best, tokens = exact.max(1)
    others = exact.scatter(1, tokens[:, None], -torch.inf)
    own = (exact - best[:, None]).clamp_min(-1e3)
    shift = hidden.double() @ head.mean.double() - best
    rest = (logits + shift.float()[:, None]).clamp_min(_LOWEST).double()
    share = rest.exp().masked_fill(near, 0.0)
    numbers = torch.stack(
        [
            best,
            others.amax(1) - best,
            own.exp().sum(1),
            (own.exp() * own).sum(1),
            _borders(uppers) + shift,
            share.sum(1),
            (share * rest).sum(1),
            share.square().sum(1),
            (share.square() * rest).sum(1),
            (share * rest).square().sum(1),
        ],
        1,
    )
    is_known = (near.sum(1) <= MOST_NEAR) & near.any(1)
    return RoughSums(tokens, *numbers.masked_fill(~is_known[:, None], torch.nan).unbind(1))


def _borders(uppers: Tensor) -> Tensor:
    """[rows]: the least upper end of near tokens."""
    vocab = uppers.shape[1]
    padded = F.pad(uppers, (0, -vocab % BLOCK), value=-torch.inf)
    ends = padded.view(len(uppers), -1, BLOCK).amax(2)
    if ends.shape[1] <= NEAR_BLOCKS:
        return torch.full_like(uppers[:, 0], -torch.inf)
    return ends.topk(NEAR_BLOCKS).values[:, -1]


rough_head_sums.backend(
    "cpu",
    "multiexit_engine._native:rough_head_sums",
    device="cpu",
    supports=lambda hidden, weight, *_, **__: is_plain(hidden, weight) and is_streamable(weight),
)
