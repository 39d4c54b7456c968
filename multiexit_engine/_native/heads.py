"""Vocabulary heads, their contrast, and tokens chosen from either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.tensors import DTYPES, address, matrix, vector
from multiexit_engine.ops.heads import HeadStatistics
from multiexit_engine.quantization import Weight, first_rows


def head_logits(hidden: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """See ``multiexit_engine.ops.head_logits``."""
    hidden, shift = hidden.contiguous(), vector(bias)
    out = torch.empty(hidden.shape[0], weight.shape[0])
    _C.head_logits(
        torch.get_num_threads(),
        hidden.data_ptr(),
        DTYPES[hidden.dtype],
        hidden.shape[0],
        matrix(weight),
        address(shift),
        out.data_ptr(),
    )
    return out


def head_statistics(
    hidden: Tensor, weight: Weight, bias: Tensor | None = None, shortlist: int | None = None
) -> HeadStatistics:
    """See ``multiexit_engine.ops.head_statistics``."""
    if shortlist is not None:
        weight = first_rows(weight, shortlist)
        bias = None if bias is None else bias[:shortlist]
    hidden, shift = hidden.contiguous(), vector(bias)
    rows = hidden.shape[0]
    out = HeadStatistics(
        torch.empty(rows, dtype=torch.int64), *(torch.empty(rows) for _ in range(4))
    )
    _C.head_statistics(
        torch.get_num_threads(),
        hidden.data_ptr(),
        DTYPES[hidden.dtype],
        rows,
        matrix(weight),
        address(shift),
        *(values.data_ptr() for values in out),
    )
    return out


def contrast_heads(
    upper_hidden: Tensor,
    upper_weight: Weight,
    lower_hidden: Tensor,
    lower_weight: Weight,
    alpha: Tensor,
    min_candidates: Tensor | None = None,
    num_candidates: Tensor | None = None,
) -> Tensor:
    """See ``multiexit_engine.ops.contrast_heads``."""
    upper_hidden, lower_hidden = upper_hidden.contiguous(), lower_hidden.contiguous()
    alpha = alpha.float().contiguous()
    least = None if min_candidates is None else min_candidates.contiguous()
    out = torch.empty(upper_hidden.shape[0], upper_weight.shape[0])
    _C.contrast_heads(
        torch.get_num_threads(),
        DTYPES[upper_hidden.dtype],
        upper_hidden.data_ptr(),
        matrix(upper_weight),
        lower_hidden.data_ptr(),
        matrix(lower_weight),
        alpha.data_ptr(),
        address(least),
        out.shape[0],
        out.data_ptr(),
        address(num_candidates),
    )
    return out


def head_tokens(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.head_tokens``."""
    hidden, shift = hidden.contiguous(), vector(bias)
    rows = ChosenRows(temperature, seeds, positions)
    _C.head_tokens(
        torch.get_num_threads(),
        hidden.data_ptr(),
        DTYPES[hidden.dtype],
        hidden.shape[0],
        matrix(weight),
        address(shift),
        rows.choice,
    )
    return rows.tokens, rows.log_probs


def contrast_tokens(
    upper_hidden: Tensor,
    upper_weight: Weight,
    lower_hidden: Tensor,
    lower_weight: Weight,
    alpha: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.contrast_tokens``."""
    upper_hidden, lower_hidden = upper_hidden.contiguous(), lower_hidden.contiguous()
    alpha = alpha.float().contiguous()
    rows = ChosenRows(temperature, seeds, positions, num_candidates)
    _C.contrast_tokens(
        torch.get_num_threads(),
        DTYPES[upper_hidden.dtype],
        upper_hidden.data_ptr(),
        matrix(upper_weight),
        lower_hidden.data_ptr(),
        matrix(lower_weight),
        alpha.data_ptr(),
        upper_hidden.shape[0],
        rows.choice,
    )
    return rows.tokens, rows.log_probs


def shared_head_tokens(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    groups: Sequence[Any],
    alpha: Tensor,
    min_candidates: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: Tensor | None = None,
    *,
    edits: None = None,
    narrowing: None = None,
    best: None = None,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.shared_head_tokens``; knows no edits, narrowing or best tokens."""
    hidden, shift = hidden.float().contiguous(), vector(bias)
    rows = ChosenRows(temperature, seeds, positions, num_candidates)
    lowers = LowerHeads(groups, alpha, min_candidates)
    _C.shared_head_tokens(
        torch.get_num_threads(),
        hidden.data_ptr(),
        hidden.shape[0],
        _C.Linear(matrix(weight), address(shift)),
        lowers.heads,
        rows.choice,
    )
    return rows.tokens, rows.log_probs


def sample_tokens(scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """See ``multiexit_engine.ops.sample_tokens``."""
    seeds, positions = seeds.contiguous(), positions.contiguous()
    tokens = torch.empty_like(seeds)
    _C.sample_tokens(
        torch.get_num_threads(),
        scores.data_ptr(),
        scores.shape[0],
        scores.shape[1],
        seeds.data_ptr(),
        positions.data_ptr(),
        tokens.data_ptr(),
    )
    return tokens


class ChosenRows:
    """How each row chooses, room for what it chooses, and the extension's view of both."""

    def __init__(
        self,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        num_candidates: Tensor | None = None,
    ) -> None:
        self._kept = temperature.float().contiguous(), seeds.contiguous(), positions.contiguous()
        self.tokens = torch.empty(temperature.shape[0], dtype=torch.int64)
        self.log_probs = torch.empty(temperature.shape[0])
        tensors = (*self._kept, self.tokens, self.log_probs, num_candidates)
        self.choice = _C.Choice(*map(address, tensors))


class LowerHeads:
    """What groups of rows are contrasted with, and the extension's view of it."""

    def __init__(self, groups: Sequence[Any], alpha: Tensor, least: Tensor | None) -> None:
        alpha = alpha.float().contiguous()
        least = None if least is None else least.contiguous()
        self._kept: list[Tensor | None] = [alpha, least]
        self.heads = []
        start = 0
        for group in groups:
            if group.lower_weight is not None:
                hidden = group.lower_hidden.float().contiguous()
                shift = vector(group.lower_bias)
                self._kept += [hidden, shift]
                self.heads.append(
                    _C.LowerHead(
                        start,
                        group.num_rows,
                        hidden.data_ptr(),
                        _C.Linear(matrix(group.lower_weight), address(shift)),
                        alpha[start:].data_ptr(),
                        0 if least is None else least[start:].data_ptr(),
                    )
                )
            start += group.num_rows
