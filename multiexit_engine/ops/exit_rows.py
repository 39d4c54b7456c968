"""Rows of a step that choose their exit on the device: who is asked, who leaves, who goes on.

The host launches; what its rows decide it does not wait for. Knows nothing of heads or layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multiexit_engine.ops.heads import HeadStatistics
from multiexit_engine.ops.registry import register_op
from multiexit_engine.ops.row_lists import RowList, compact_rows

# the codes of measures are their places here; a row with code -1 is never asked
MEASURES = ("max_prob", "margin", "entropy", "patience", "similarity", "probe")
# what a row does beside running: whatever its owner does, or giving keys and values only
RUNS_ANYHOW, IS_COPIED = 1, 2


@dataclass(frozen=True, eq=False)
class ExitRules:
    """What rows are asked, [rows] each.

    Attributes:
        measures: int32 codes, places in ``MEASURES``.
        thresholds: float32; entropy passes below, all others above.
        shortlists: int32, tokens of the vocabulary that are looked at first; 0: all at once.
    """

    measures: Tensor
    thresholds: Tensor
    shortlists: Tensor


@dataclass(frozen=True, eq=False)
class ExitProgress:
    """How far rows have come, [rows] each; written in place.

    Attributes:
        left: int32, the 1-based layer that a row left after, 0 while it goes on.
        values: float32, what was measured last.
        tokens: int64, the best token of the last head that was read as a whole.
        streaks: int32, exits in a row with this token.
        is_read: int32, 1 where this token is that of the exit that the row left at.
        passed: int32, the last layer at which the first tokens of the vocabulary let a row pass.
    """

    left: Tensor
    values: Tensor
    tokens: Tensor
    streaks: Tensor
    is_read: Tensor
    passed: Tensor


@dataclass(frozen=True, eq=False)
class RowPaths:
    """Through which layers rows may go, [rows] each.

    Attributes:
        owners: int64, the row whose leaving ends the run of this one; often itself.
        joins: int32, layers below the first that the row runs.
        depths: int32, layers up to the last that it may run; 0 for rows that are nobody's.
        flags: int32, ``RUNS_ANYHOW`` and ``IS_COPIED``.
    """

    owners: Tensor
    joins: Tensor
    depths: Tensor
    flags: Tensor


@register_op
def rows_asked(
    here: Tensor, layer: int, kinds: int, shortlist: int, rules: ExitRules, progress: ExitProgress
) -> RowList:
    """List the rows that are asked something at an exit.

    Args:
        here: [rows] uint8, whether a row is asked at this exit if it comes there.
        layer: 1-based, of the exit.
        kinds: bits of the measures that are asked for now.
        shortlist: rows that look at so many tokens first; 0: those that look at all, and those that
            passed with fewer at this very exit.
        rules: of all rows.
        progress: of all rows.

    Returns:
        RowList of rows that have not left.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.
    """
    asked = (here != 0) & (progress.left == 0) & (rules.measures >= 0)
    asked &= (kinds >> rules.measures.clamp(min=0)) & 1 != 0
    own = rules.shortlists == shortlist
    return compact_rows(asked & (own | (progress.passed == layer) if shortlist == 0 else own))


@register_op
def decide_exits(
    before: Tensor,
    layer: int,
    found: HeadStatistics | Tensor,
    rules: ExitRules,
    progress: ExitProgress,
    is_bound: bool = False,
) -> None:
    """Note what rows measured at an exit; those that pass leave.

    NaN never passes. "patience" counts exits with one best token, beginning anew after NaN.

    Args:
        before: [rows + 1] int32, how many rows before each are asked: that of their ``RowList``.
        layer: 1-based, of the exit.
        found: what their heads say, [rows] each; or [rows] the measure itself.
        rules: of all rows.
        progress: of all rows, written in place.
        is_bound: the heads were read in part: whoever passes is noted, and nobody leaves.

    Returns:
        Nothing.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.5; Xin et al. 2020, arXiv:2004.12993
        (entropy).
    """
    marks = before[1:] > before[:-1]
    values = found if isinstance(found, Tensor) else _measured(found, rules, is_bound)
    if isinstance(found, HeadStatistics) and not is_bound:
        is_same = (found.tokens == progress.tokens) & ~found.log_probs.isnan()
        streaks = torch.where(is_same, progress.streaks + 1, 1)
        progress.streaks.copy_(torch.where(marks, streaks, progress.streaks))
        progress.tokens.copy_(torch.where(marks, found.tokens, progress.tokens))
        is_patient = rules.measures == MEASURES.index("patience")
        values = torch.where(is_patient, streaks.to(values.dtype), values)
    is_entropy = rules.measures == MEASURES.index("entropy")
    passes = marks & torch.where(is_entropy, values <= rules.thresholds, values >= rules.thresholds)
    progress.values.copy_(torch.where(marks, values.float(), progress.values))
    target = progress.passed if is_bound else progress.left
    target.copy_(target.masked_fill(passes, layer))
    if isinstance(found, HeadStatistics) and not is_bound:
        progress.is_read.copy_(progress.is_read.masked_fill(passes, 1))


@register_op
def rows_beyond(left: Tensor, layer: int, paths: RowPaths) -> tuple[RowList, RowList]:
    """List the rows that go on beyond a layer.

    Args:
        left: [rows] int32, as in ``ExitProgress``.
        layer: 1-based; 0 for the first.
        paths: of all rows.

    Returns:
        RowLists of the rows that run, and of those that only give keys and values.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.4 (keys and values of skipped layers).
    """
    goes_on = left.index_select(0, paths.owners) == 0
    goes_on |= (paths.flags & RUNS_ANYHOW) != 0
    goes_on &= (paths.joins <= layer) & (paths.depths > layer)
    is_copied = (paths.flags & IS_COPIED) != 0
    return compact_rows(goes_on & ~is_copied), compact_rows(goes_on & is_copied)


@register_op
def settle_paths(left: Tensor, sources: Tensor, paths: RowPaths) -> None:
    """Say of rows that may wait since the step before whether and after which layer they do.

    Where the row that ended their run ran through all layers, nothing is left for them to run.

    Args:
        left: [any] int32, where rows of the step before left, as in ``ExitProgress``.
        sources: [rows] int32, which of them ended the run of each row; -1 where ``paths`` are known
            to be right.
        paths: of all rows; their ``joins`` are where rows waited before that step, 0 for a row
            that is that step's own. Written in place.

    Returns:
        Nothing.

    Source: ``waits_after`` in ``runtime/launched/exit_layout.py``, for all rows of a step.
    """
    is_unsettled = sources >= 0
    layers = left.index_select(0, sources.clamp(min=0))
    joins = torch.maximum(paths.joins, layers).clamp(min=1)
    paths.joins.copy_(torch.where(is_unsettled, joins, paths.joins))
    paths.depths.copy_(paths.depths.masked_fill(is_unsettled & (layers == 0), 0))


def _measured(found: HeadStatistics, rules: ExitRules, is_bound: bool) -> Tensor:
    """[rows]: of each row the number that its measure asks for."""
    best = found.log_probs.exp()
    margin = best - found.second_log_probs.exp()
    entropy = -found.log_probs if is_bound else found.entropy
    code = rules.measures
    values = torch.where(code == MEASURES.index("margin"), margin, best)
    return torch.where(code == MEASURES.index("entropy"), entropy, values)


rows_asked.backend("triton", "multiexit_engine.kernels.exit_rows:rows_asked", device="cuda")
decide_exits.backend("triton", "multiexit_engine.kernels.exit_rows:decide_exits", device="cuda")
rows_beyond.backend("triton", "multiexit_engine.kernels.exit_rows:rows_beyond", device="cuda")
settle_paths.backend("triton", "multiexit_engine.kernels.exit_rows:settle_paths", device="cuda")
