"""Rows that choose their exit: who is asked, who leaves and who goes on, one launch each.

One program looks at all rows of a step that are to be listed, so that lists are in their order.
Knows nothing of heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.launch import options
from multiexit_engine.kernels.row_lists import RowList

_BLOCK = 256
# places of the measures in the op's table
_MARGIN = tl.constexpr(1)
_ENTROPY = tl.constexpr(2)
_PATIENCE = tl.constexpr(3)
_RUNS_ANYHOW = tl.constexpr(1)
_IS_COPIED = tl.constexpr(2)


def rows_asked(
    here: Tensor, layer: int, kinds: int, shortlist: int, rules: Any, progress: Any
) -> RowList:
    """See ``multiexit_engine.ops.exit_rows``. One launch of one program."""
    listed = _empty_list(here)
    asked_kernel[(1,)](
        here, rules.measures, rules.shortlists, progress.left, progress.passed,
        listed.rows, listed.before, layer, kinds, shortlist, len(here),
        BLOCK=_BLOCK, **options(4, 64),
    )  # fmt: skip
    return listed


def decide_exits(
    before: Tensor, layer: int, found: Any, rules: Any, progress: Any, is_bound: bool = False
) -> None:
    """See ``multiexit_engine.ops.exit_rows``. One launch of one program."""
    is_told = isinstance(found, Tensor)
    columns = (None, None, None, None)
    if not is_told:
        columns = found.tokens, found.log_probs, found.second_log_probs, found.entropy
    decide_kernel[(1,)](
        before, *columns, found if is_told else None, rules.measures, rules.thresholds,
        progress.left, progress.values, progress.tokens, progress.streaks, progress.is_read,
        progress.passed, layer, len(before) - 1,
        TOLD=is_told, BOUND=is_bound, BLOCK=_BLOCK, **options(4, 64),
    )  # fmt: skip


def rows_beyond(left: Tensor, layer: int, paths: Any) -> tuple[RowList, RowList]:
    """See ``multiexit_engine.ops.exit_rows``. One launch of one program."""
    running, copied = _empty_list(left), _empty_list(left)
    beyond_kernel[(1,)](
        left, paths.owners, paths.joins, paths.depths, paths.flags, running.rows, running.before,
        copied.rows, copied.before, layer, len(left), BLOCK=_BLOCK, **options(4, 64),
    )  # fmt: skip
    return running, copied


def settle_paths(left: Tensor, sources: Tensor, paths: Any) -> None:
    """See ``multiexit_engine.ops.exit_rows``. One launch."""
    count = len(sources)
    settle_kernel[(triton.cdiv(count, _BLOCK),)](
        left, sources, paths.joins, paths.depths, count, BLOCK=_BLOCK, **options(4, 64)
    )


def _empty_list(like: Tensor) -> RowList:
    rows = torch.empty(len(like), dtype=torch.int32, device=like.device)
    return RowList(rows, torch.empty(len(like) + 1, dtype=torch.int32, device=like.device))


@triton.jit
def _listed(flag, rows, inside, count, row_ptr, before_ptr):
    """Put marked rows behind those that are listed by now; how many these are then."""
    flag = (flag & inside).to(tl.int32)
    place = count + tl.cumsum(flag, 0) - flag
    tl.store(before_ptr + rows, place, mask=inside)
    tl.store(row_ptr + place, rows, mask=flag > 0)
    return count + tl.sum(flag, 0)


@triton.jit(do_not_specialize=["layer", "kinds", "shortlist", "num_rows"])
def asked_kernel(
    here_ptr,
    measure_ptr,
    shortlist_ptr,
    left_ptr,
    passed_ptr,
    row_ptr,
    before_ptr,
    layer,
    kinds,
    shortlist,
    num_rows,
    BLOCK: tl.constexpr,
):
    """All rows; those are listed that come to this exit and are asked for one of the measures."""
    count = 0
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < num_rows
        here = tl.load(here_ptr + rows, mask=inside, other=0)  # [BLOCK]
        left = tl.load(left_ptr + rows, mask=inside, other=1)  # [BLOCK]
        code = tl.load(measure_ptr + rows, mask=inside, other=-1)  # [BLOCK]
        own = tl.load(shortlist_ptr + rows, mask=inside, other=0)  # [BLOCK]
        passed = tl.load(passed_ptr + rows, mask=inside, other=0)  # [BLOCK]
        is_kind = (code >= 0) & (((kinds >> tl.maximum(code, 0)) & 1) != 0)
        is_turn = (own == shortlist) | ((shortlist == 0) & (passed == layer))
        flag = (here != 0) & (left == 0) & is_kind & is_turn
        count = _listed(flag, rows, inside, count, row_ptr, before_ptr)
    tl.store(before_ptr + num_rows, count)


@triton.jit(do_not_specialize=["layer", "num_rows"])
def decide_kernel(
    before_ptr,
    token_ptr,
    log_prob_ptr,
    second_ptr,
    entropy_ptr,
    told_ptr,
    measure_ptr,
    threshold_ptr,
    left_ptr,
    value_ptr,
    best_ptr,
    streak_ptr,
    read_ptr,
    passed_ptr,
    layer,
    num_rows,
    TOLD: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All rows. TOLD: the measure itself is given. BOUND: of a part of the vocabulary."""
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < num_rows
        before = tl.load(before_ptr + rows, mask=inside, other=0)  # [BLOCK]
        asked = inside & (tl.load(before_ptr + rows + 1, mask=inside, other=0) > before)
        code = tl.load(measure_ptr + rows, mask=asked, other=-1)  # [BLOCK]
        threshold = tl.load(threshold_ptr + rows, mask=asked, other=0.0)  # [BLOCK]
        if TOLD:
            value = tl.load(told_ptr + rows, mask=asked, other=0.0).to(tl.float32)  # [BLOCK]
        else:
            log_prob = tl.load(log_prob_ptr + rows, mask=asked, other=0.0)  # [BLOCK]
            second = tl.load(second_ptr + rows, mask=asked, other=0.0)  # [BLOCK]
            best = tl.exp(log_prob)
            value = tl.where(code == _MARGIN, best - tl.exp(second), best)
            if BOUND:
                value = tl.where(code == _ENTROPY, -log_prob, value)
            else:
                entropy = tl.load(entropy_ptr + rows, mask=asked, other=0.0)  # [BLOCK]
                value = tl.where(code == _ENTROPY, entropy, value)
                token = tl.load(token_ptr + rows, mask=asked, other=0)  # [BLOCK]
                last = tl.load(best_ptr + rows, mask=asked, other=-1)  # [BLOCK]
                streak = tl.load(streak_ptr + rows, mask=asked, other=0)  # [BLOCK]
                streak = tl.where((token == last) & (log_prob == log_prob), streak + 1, 1)
                value = tl.where(code == _PATIENCE, streak.to(tl.float32), value)
                tl.store(streak_ptr + rows, streak, mask=asked)
                tl.store(best_ptr + rows, token, mask=asked)
        tl.store(value_ptr + rows, value, mask=asked)
        passes = asked & tl.where(code == _ENTROPY, value <= threshold, value >= threshold)
        layers = tl.zeros((BLOCK,), tl.int32) + layer
        if BOUND:
            tl.store(passed_ptr + rows, layers, mask=passes)
        else:
            tl.store(left_ptr + rows, layers, mask=passes)
            if not TOLD:
                tl.store(read_ptr + rows, tl.full((BLOCK,), 1, tl.int32), mask=passes)


@triton.jit(do_not_specialize=["layer", "num_rows"])
def beyond_kernel(
    left_ptr,
    owner_ptr,
    join_ptr,
    depth_ptr,
    flag_ptr,
    running_ptr,
    running_before_ptr,
    copied_ptr,
    copied_before_ptr,
    layer,
    num_rows,
    BLOCK: tl.constexpr,
):
    """All rows; those are listed whose owner goes on, and which are to go there."""
    running = 0
    copied = 0
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < num_rows
        owner = tl.load(owner_ptr + rows, mask=inside, other=0)  # [BLOCK]
        flags = tl.load(flag_ptr + rows, mask=inside, other=0)  # [BLOCK]
        joins = tl.load(join_ptr + rows, mask=inside, other=0)  # [BLOCK]
        depths = tl.load(depth_ptr + rows, mask=inside, other=0)  # [BLOCK]
        goes_on = tl.load(left_ptr + owner, mask=inside, other=1) == 0  # [BLOCK]
        goes_on = goes_on | ((flags & _RUNS_ANYHOW) != 0)
        goes_on = goes_on & (joins <= layer) & (depths > layer)
        is_copied = (flags & _IS_COPIED) != 0
        running = _listed(
            goes_on & (is_copied == 0), rows, inside, running, running_ptr, running_before_ptr
        )
        copied = _listed(goes_on & is_copied, rows, inside, copied, copied_ptr, copied_before_ptr)
    tl.store(running_before_ptr + num_rows, running)
    tl.store(copied_before_ptr + num_rows, copied)


@triton.jit(do_not_specialize=["num_rows"])
def settle_kernel(left_ptr, source_ptr, join_ptr, depth_ptr, num_rows, BLOCK: tl.constexpr):
    """A block of rows each; those with a source wait where it left, if it did."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + rows, mask=rows < num_rows, other=-1)  # [BLOCK]
    unsettled = source >= 0
    left = tl.load(left_ptr + source, mask=unsettled, other=0)  # [BLOCK]
    joins = tl.load(join_ptr + rows, mask=unsettled, other=0)  # [BLOCK]
    tl.store(join_ptr + rows, tl.maximum(tl.maximum(joins, left), 1), mask=unsettled)
    tl.store(depth_ptr + rows, tl.zeros((BLOCK,), tl.int32), mask=unsettled & (left == 0))
