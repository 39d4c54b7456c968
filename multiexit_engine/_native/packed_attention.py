"""Attention among packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.tensors import DTYPES


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    scale: float,
) -> Tensor:
    """See ``multiexit_engine.ops.packed_attention``."""
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
        out.data_ptr(),
    )
    return out


def _with_plain_rows(x: Tensor) -> Tensor:
    """Itself where a row's heads lie one behind the other; rows may lie apart."""
    is_plain = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if is_plain else x.contiguous()
