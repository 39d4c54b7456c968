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
from multiexit_engine.ops.heads import HeadStatistics


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
    hidden, shift = hidden.contiguous(), vector(bias)
    reaches, slacks = bounds.reaches.contiguous(), bounds.slacks.contiguous()
    rows = ChosenRows(temperature, seeds, positions, num_candidates)
    lowers = LowerHeads(groups, alpha, None)
    _C.coded_head_tokens(
        torch.get_num_threads(),
        _C.RoughRows(
            hidden.data_ptr(),
            states.codes.data_ptr(),
            states.scales.data_ptr(),
            states.codes.shape[1],
            reaches.data_ptr(),
            slacks.data_ptr(),
            hidden.shape[0],
        ),
        _C.RoughHead(
            head.codes.data_ptr(),
            head.starts.data_ptr(),
            head.scales.data_ptr(),
            head.errors.data_ptr(),
            head.vocab,
            states.codes.shape[2],
        ),
        _C.Linear(matrix(weight), address(shift)),
        lowers.heads,
        rows.choice,
    )
    return rows.tokens


def coded_head_statistics(
    hidden: Tensor,
    hidden_scales: Tensor,
    codes: Tensor,
    starts: Tensor,
    scales: Tensor,
    vocab: int,
    bias: Tensor | None = None,
) -> HeadStatistics:
    """See ``multiexit_engine.ops.coded_head_statistics``."""
    hidden, shift = hidden.contiguous(), vector(bias)
    rows = hidden.shape[0]
    out = HeadStatistics(
        torch.empty(rows, dtype=torch.int64), *(torch.empty(rows) for _ in range(4))
    )
    _C.coded_head_statistics(
        torch.get_num_threads(),
        hidden.data_ptr(),
        hidden_scales.data_ptr(),
        hidden.shape[1],
        rows,
        codes.data_ptr(),
        starts.data_ptr(),
        scales.data_ptr(),
        vocab,
        hidden.shape[-1],
        address(shift),
        *(values.data_ptr() for values in out),
    )
    return out
