"""Attention whose scores have a bias for the distance of query and key, as T5's.

A bias table has a value for each head and distance; distances beyond its ends have its last value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from multiexit_engine.batch import SequenceLayout
from multiexit_engine.ops.attention import kernel_reads
from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import register_op


@register_op
def biased_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: SequenceLayout,
    scale: float,
    bias: Tensor,
) -> Tensor:
    """As ``paged_attention`` without a window, with a bias added to the scaled scores.

    Args:
        query: [tokens, heads, head_dim], flat over the sequences of ``layout``.
        key_cache: [blocks, block_size, heads, head_dim].
        value_cache: of the same shape.
        layout: where each sequence lies in ``query`` and in the cache.
        scale: factor of the scores.
        bias: [heads, reach]; of a key that stands d places before its query ``bias[:, d]``.

    Returns:
        [tokens, heads, head_dim] in the dtype of ``query``.

    Source: Raffel et al. 2020, arXiv:1910.10683, 2.1; ``T5Attention`` of transformers.
    """
    block_size = key_cache.shape[1]
    keys, values = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    if layout.has_bounds:
        return _attend_bounded(query, keys, values, layout, block_size, scale, bias)
    parts = []
    rows = torch.split(query, list(layout.query_lens))
    for own, table, context in zip(rows, layout.block_tables, layout.context_lens, strict=True):
        places = torch.arange(context, device=query.device)
        slots = table[places // block_size] * block_size + places % block_size
        distance = places[context - own.shape[0] :, None] - places
        mask = bias[:, distance.clamp(0, bias.shape[1] - 1)]
        mask = mask.masked_fill(distance < 0, float("-inf"))
        parts.append(_attend(own, keys[slots], values[slots], mask, scale))
    return torch.cat(parts)


@register_op
def biased_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, lens: Sequence[int], scale: float, bias: Tensor
) -> Tensor:
    """As ``packed_attention`` of texts over themselves, with a bias added to the scaled scores.

    Args:
        query: [sum(lens), heads, head_dim], the texts one behind the other.
        key: of the same shape.
        value: of the same shape.
        lens: tokens of each text.
        scale: factor of the scores.
        bias: [heads, 2 * reach + 1]; of a key d places before its query (after it, if negative)
            ``bias[:, reach + d]``.

    Returns:
        [sum(lens), heads, head_dim] in the dtype of ``query``.

    Source: Raffel et al. 2020, arXiv:1910.10683, 2.1; ``T5Attention`` of transformers.
    """
    reach, counts = bias.shape[1] // 2, list(lens)
    parts = []
    for q, k, v in zip(*(torch.split(x, counts) for x in (query, key, value)), strict=True):
        places = torch.arange(q.shape[0], device=query.device)
        distance = (places[:, None] - places).clamp(-reach, reach)
        parts.append(_attend(q, k, v, bias[:, reach + distance], scale))
    return torch.cat(parts)


def _attend_bounded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: SequenceLayout,
    block_size: int,
    scale: float,
    bias: Tensor,
) -> Tensor:
    """One query of each sequence, whose lengths come from the device within bounds."""
    contexts = layout.context_lens_device.long()[:, None]
    offsets = torch.arange(max(layout.context_lens), device=query.device)
    # past a sequence's end its own last key is read again and masked
    places = torch.minimum(offsets, contexts - 1)
    slots = layout.block_tables.gather(1, places // block_size) * block_size + places % block_size
    distance = contexts - 1 - offsets
    mask = bias[:, distance.clamp(0, bias.shape[1] - 1)].transpose(0, 1)
    mask = mask.masked_fill((distance < 0)[:, None], float("-inf"))
    mixed = scaled_dot_product_attention(
        query[:, :, None],
        keys[slots].transpose(1, 2),
        values[slots].transpose(1, 2),
        attn_mask=mask[:, :, None].to(query.dtype),
        scale=scale,
    )
    return mixed[:, :, 0]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[rows, heads, head_dim] of one text, with what is added to its scores [heads, rows, keys]."""
    mixed = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask.to(query.dtype)[None],
        scale=scale,
    )
    return mixed[0].transpose(0, 1)


biased_paged_attention.backend(
    "triton",
    "multiexit_engine.kernels.attention:biased_paged_attention",
    device="cuda",
    supports=kernel_reads,
)
biased_packed_attention.backend(
    "triton",
    "multiexit_engine.kernels.packed_attention:biased_packed_attention",
    device="cuda",
    supports=lambda query, *_: query.dtype in (torch.bfloat16, torch.float16, torch.float32),
)
biased_paged_attention.backend(
    "cpu",
    "multiexit_engine._native:biased_paged_attention",
    device="cpu",
    supports=lambda query, key_cache, value_cache, *_: (
        is_plain(query, key_cache) and is_streamable(key_cache, value_cache)
    ),
)
biased_packed_attention.backend(
    "cpu",
    "multiexit_engine._native:biased_packed_attention",
    device="cpu",
    supports=lambda query, key, value, *_: is_plain(query, key, value),
)
