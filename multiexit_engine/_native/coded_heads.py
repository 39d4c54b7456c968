"""Heads in 8-bit codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.tensors import address, matrix, vector
from multiexit_engine.ops.coded_heads import GROUP, CodedHidden
from multiexit_engine.ops.heads import HeadStatistics


def code_hidden(hidden: Tensor) -> CodedHidden:
    """See ``multiexit_engine.ops.code_hidden``."""
    hidden = hidden.float().contiguous()
    rows, columns = hidden.shape
    codes = torch.empty(rows, columns + -columns % GROUP, dtype=torch.uint8)
    norms, errors = torch.empty(2, rows, dtype=torch.float64)
    found = CodedHidden(codes, torch.empty(rows), norms, errors)
    _C.code_rows(
        torch.get_num_threads(),
        hidden.data_ptr(),
        rows,
        columns,
        codes.data_ptr(),
        found.scales.data_ptr(),
        norms.data_ptr(),
        errors.data_ptr(),
    )
    return found


def coded_head_tokens(
    hidden: Tensor,
    weight: Tensor,
    states: Any,
    head: Any,
    errors: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """See ``multiexit_engine.ops.coded_head_tokens``."""
    hidden, errors, shift = hidden.contiguous(), errors.contiguous(), vector(bias)
    tokens = torch.empty(hidden.shape[0], dtype=torch.int64)
    _C.coded_head_tokens(
        torch.get_num_threads(),
        hidden.data_ptr(),
        states.codes.data_ptr(),
        states.scales.data_ptr(),
        errors.data_ptr(),
        hidden.shape[0],
        head.codes.data_ptr(),
        head.starts.data_ptr(),
        head.scales.data_ptr(),
        states.codes.shape[1],
        matrix(weight),
        address(shift),
        tokens.data_ptr(),
    )
    return tokens


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
        rows,
        codes.data_ptr(),
        starts.data_ptr(),
        scales.data_ptr(),
        vocab,
        hidden.shape[1],
        address(shift),
        *(values.data_ptr() for values in out),
    )
    return out
