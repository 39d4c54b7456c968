"""Attention over the paged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.tensors import DTYPES, by_place


def layout_view(layout: Any) -> _C.Layout:
    """The extension's view of a SequenceLayout, which must outlive it; made once a step."""
    found: _C.Layout | None = layout.scratch.get("native")
    if found is None:
        tables = layout.block_tables
        found = layout.scratch["native"] = _C.Layout(
            sum(layout.query_lens),
            len(layout.query_lens),
            layout.cu_query_lens.data_ptr(),
            layout.context_lens_device.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            max(layout.context_lens),
        )
    return found


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: Any,
    scale: float,
    window: int | None,
) -> Tensor:
    """See ``multiexit_engine.ops.paged_attention``."""
    return _paged(query, key_cache, value_cache, layout, scale, window or 0, _C.DistanceBias())


def biased_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: Any,
    scale: float,
    bias: Tensor,
) -> Tensor:
    """See ``multiexit_engine.ops.biased_paged_attention``."""
    table = by_place(bias)
    view = _C.DistanceBias(table.data_ptr(), bias.shape[1] - 1, 0)
    return _paged(query, key_cache, value_cache, layout, scale, 0, view)


def _paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: Any,
    scale: float,
    window: int,
    bias: _C.DistanceBias,
) -> Tensor:
    query = query.contiguous()
    out = torch.empty_like(query)
    cache = _C.Cache(
        key_cache.data_ptr(), value_cache.data_ptr(), DTYPES[query.dtype], *key_cache.shape[1:]
    )
    _C.paged_attention(
        torch.get_num_threads(),
        query.data_ptr(),
        query.shape[1],
        cache,
        layout_view(layout),
        scale,
        window,
        bias,
        out.data_ptr(),
    )
    return out
