"""Attention among packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.tensors import DTYPES, by_place


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    scale: float,
) -> Tensor:
    """See ``multiexit_engine.ops.packed_attention``."""
    return _packed(query, key, value, query_lens, key_lens, scale, _C.DistanceBias())


def biased_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, lens: Sequence[int], scale: float, bias: Tensor
) -> Tensor:
    """See ``multiexit_engine.ops.biased_packed_attention``."""
    table, reach = by_place(bias), bias.shape[1] // 2
    view = _C.DistanceBias(table.data_ptr(), reach, reach)
    return _packed(query, key, value, lens, lens, scale, view)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    scale: float,
    bias: _C.DistanceBias,
) -> Tensor:
    heads, head_dim = query.shape[1:]
    query, key, value = (_with_plain_rows(each) for each in (query, key, value))
    out = query.new_empty(query.shape)
    _C.packed_attention(
        torch.get_num_threads(),
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        DTYPES[query.dtype],
        list(query_lens),
        list(key_lens),
        heads,
        head_dim,
        scale,
        bias,
        out.data_ptr(),
    )
    return out


def _with_plain_rows(x: Tensor) -> Tensor:
    """Itself where a row's heads lie one behind the other; rows may lie apart."""
    is_plain = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if is_plain else x.contiguous()
