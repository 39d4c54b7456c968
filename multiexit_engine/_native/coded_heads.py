"""Heads in 8-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.heads import ChosenRows, LowerHeads
from multiexit_engine._native.tensors import address, matrix, vector
from multiexit_engine.ops.coded_heads import GROUP, CodedHidden
from multiexit_engine.ops.rough_sums import RoughSums


def code_hidden(hidden: Tensor, num_terms: int = 1, columns: Tensor | None = None) -> CodedHidden:
    """See ``multiexit_engine.ops.code_hidden``."""
    hidden, factors = hidden.float().contiguous(), vector(columns)
    rows, size = hidden.shape
    codes = torch.empty(rows, num_terms, size + -size % GROUP, dtype=torch.uint8)
    norms, errors = torch.empty(2, rows, dtype=torch.float64)
    found = CodedHidden(codes, torch.empty(rows, num_terms), norms, errors)
    _C.code_rows(
        torch.get_num_threads(),
        hidden.data_ptr(),
        address(factors),
        rows,
        size,
        num_terms,
        codes.data_ptr(),
        found.scales.data_ptr(),
        norms.data_ptr(),
        errors.data_ptr(),
    )
    return found


def coded_head_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: Sequence[Any],
    alpha: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    states: Any,
    head: Any,
    bounds: Any,
    num_candidates: Tensor | None = None,
) -> Tensor:
    """See ``multiexit_engine.ops.coded_head_tokens``."""
    hidden, shift = hidden.float().contiguous(), vector(bias)
    rows = ChosenRows(temperature, seeds, positions, num_candidates)
    lowers = LowerHeads(groups, alpha, None)
    _C.coded_head_tokens(
        torch.get_num_threads(),
        _rough_rows(hidden, states, bounds),
        _rough_head(states, head),
        _C.Linear(matrix(weight), address(shift)),
        lowers.heads,
        rows.choice,
    )
    return rows.tokens


def rough_head_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Any,
    head: Any,
    bounds: Any,
    finer: Any = None,
) -> RoughSums:
    """See ``multiexit_engine.ops.rough_head_sums``."""
    hidden, shift = hidden.float().contiguous(), vector(bias)
    tokens = torch.empty(len(hidden), dtype=torch.int64)
    numbers = torch.empty(len(hidden), len(RoughSums._fields) - 1, dtype=torch.float64)
    _C.rough_head_sums(
        torch.get_num_threads(),
        _rough_rows(hidden, states, bounds),
        _rough_head(states, head, finer),
        _C.Linear(matrix(weight), address(shift)),
        head.mean.data_ptr(),
        tokens.data_ptr(),
        numbers.data_ptr(),
    )
    return RoughSums(tokens, *numbers.unbind(1))


def _rough_rows(hidden: Tensor, states: Any, bounds: Any) -> _C.RoughRows:
    """What is contiguous, as ``code_states`` and ``logit_bounds`` make it."""
    return _C.RoughRows(
        hidden.data_ptr(),
        states.codes.data_ptr(),
        states.scales.data_ptr(),
        states.codes.shape[1],
        bounds.reaches.data_ptr(),
        bounds.slacks.data_ptr(),
        hidden.shape[0],
    )


def _rough_head(states: Any, head: Any, finer: Any = None) -> _C.RoughHead:
    return _C.RoughHead(
        head.codes.data_ptr(),
        head.starts.data_ptr(),
        head.scales.data_ptr(),
        (head if finer is None else finer).errors.data_ptr(),
        head.vocab,
        states.codes.shape[2],
        *(() if finer is None else map(Tensor.data_ptr, (finer.codes, finer.starts, finer.scales))),
    )
