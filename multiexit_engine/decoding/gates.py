"""How sure an exit is of a row: the measures of ``EarlyExit``, each from the row's own data.

Gives numbers on the device. Knows nothing of layers that run, or of what becomes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.modes import EarlyExit, Measure
from multiexit_engine.ops import HeadStatistics, head_statistics


class HeadReading(NamedTuple):
    """What a whole head says of some rows.

    Attributes:
        values: [rows] float32, the measure of each.
        tokens: [rows] int64, the most likely token, the lowest id among equals.
    """

    values: Tensor
    tokens: Tensor


def read_head(measures: Sequence[Measure], operands: HeadOperands) -> HeadReading:
    """Measure rows on the whole vocabulary of an exit, each by a measure of its own.

    "patience" counts exits, so its value is the log-probability, NaN where the head gave NaN.

    Args:
        measures: "max_prob", "margin", "entropy" or "patience", one for each row.
        operands: of the exit's head for these rows.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.5 (probability, margin); Xin et al.
        2020, arXiv:2004.12993 (entropy).
    """
    return reading_of(measures, head_statistics(*operands))


def reading_of(measures: Sequence[Measure], found: HeadStatistics) -> HeadReading:
    """``read_head`` from statistics of the whole vocabulary."""
    return HeadReading(_columns(measures, found, {}), found.tokens)


def joint_statistics(heads: Sequence[HeadOperands]) -> list[HeadStatistics]:
    """The statistics of each head's rows; a matrix that several heads share is read once for all.

    Exits of a model share their matrix but for ``LAYER_SPECIFIC_PROJECTION``.
    """
    sharing: dict[tuple[int, int], list[int]] = {}
    for place, head in enumerate(heads):
        sharing.setdefault((id(head.weight), id(head.bias)), []).append(place)
    found: dict[int, HeadStatistics] = {}
    for places in sharing.values():
        counts = [len(heads[place].hidden) for place in places]
        hidden = torch.cat([heads[place].hidden for place in places])
        together = head_statistics(*heads[places[0]]._replace(hidden=hidden))
        columns = zip(*(torch.split(column, counts) for column in together), strict=True)
        found |= {p: HeadStatistics(*own) for p, own in zip(places, columns, strict=True)}
    return [found[place] for place in range(len(heads))]


def bounds(measures: Sequence[Measure], operands: HeadOperands, shortlist: int) -> Tensor:
    """What the first tokens of the vocabulary allow: rows that they rule out need no whole head.

    With S the first tokens, Z the sum of exp(logit) over all tokens and Z_S over S, each token of
    S has p = exp(logit) / Z <= q = exp(logit) / Z_S. So where the best token of all is in S

    - max p <= max q, and "max_prob" passes only if max q does;
    - the runner-up in S is not above that of all tokens, hence p1 - p2 <= q1 - q2 ("margin");
    - the entropy of p is at least -log max p >= -log max q, hence "entropy" passes only if
      -log max q does.

    Where it is not in S, a row may be ruled out that would pass. No row passes by its bound alone.

    Args:
        measures: "max_prob", "margin" or "entropy", one for each row.
        operands: of the exit's head for these rows.
        shortlist: number of tokens.

    Returns:
        [rows] float32: what stands for the measure in the comparison with the threshold.
    """
    found = head_statistics(*operands, shortlist=shortlist)
    return _columns(measures, found, {"entropy": -found.log_probs})


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """[rows] float32 cosines between two [rows, hidden] states of each row.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.5 (hidden-state saturation).
    """
    one, other = before.double(), after.double()
    dots = (one * other).sum(-1)
    norms = (one * one).sum(-1) * (other * other).sum(-1)
    return (dots / norms.sqrt()).float()


def passes(mode: EarlyExit, value: float) -> bool:
    """Whether a measured value lets its row leave; NaN never does."""
    assert mode.threshold is not None, "the intake replaces what is calibrated by its threshold"
    return value <= mode.threshold if mode.measure == "entropy" else value >= mode.threshold


def _columns(
    measures: Sequence[Measure], found: HeadStatistics, known: dict[Measure, Tensor]
) -> Tensor:
    """[rows]: of each row the number that its measure asks for."""
    columns = {kind: _measured(kind, found) for kind in set(measures)} | known
    if len(set(measures)) == 1:
        return columns[measures[0]]
    return torch.stack([columns[kind][row] for row, kind in enumerate(measures)])


def _measured(kind: Measure, found: HeadStatistics) -> Tensor:
    if kind == "entropy":
        return found.entropy
    if kind == "patience":
        return found.log_probs
    best = found.log_probs.exp()
    return best - found.second_log_probs.exp() if kind == "margin" else best
