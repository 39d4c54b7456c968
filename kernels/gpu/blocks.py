"""Spans of decoder blocks in few launches: six a pre-norm block up to 4 rows.

Reads the parts of blocks by their names, as the CPU's front does; imports none of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.kernels.attention import attend_paged, paged_attention
from multiexit_engine.kernels.block_parts import PartNorm, added, inner
from multiexit_engine.kernels.norms import rms_norm
from multiexit_engine.kernels.products import Norm, product
from multiexit_engine.kernels.qkv import Slots, Turn, place, store_qkv


def decoder_blocks(hidden: Tensor, blocks: Sequence[Any], kv_cache: Any, batch: Any) -> Tensor:
    """See ``multiexit_engine.ops.blocks``. The residual stream is float32 between layers."""
    hidden = hidden.float()
    for block in blocks:
        attention, cross, mlp = block.attention, block.cross_attention, block.mlp
        norm = PartNorm(block.attention_norm, block.is_post_norm)
        attended = _attended(hidden, norm.before, attention, kv_cache, batch)
        hidden = norm.after(added(hidden, attended, attention.output))
        if cross is not None:
            norm = PartNorm(block.cross_norm, block.is_post_norm)
            mixed = _of_sources(hidden, norm.before, cross, kv_cache, batch)
            hidden = norm.after(added(hidden, mixed, cross.output))
        norm = PartNorm(block.mlp_norm, block.is_post_norm)
        hidden = norm.after(added(hidden, inner(hidden, norm.before, mlp), mlp.down))
    return hidden


def _of_sources(hidden: Tensor, norm: Norm | None, cross: Any, kv_cache: Any, batch: Any) -> Tensor:
    """[tokens, width of all heads]; reads what was stored of each token's source."""
    query = product(hidden, cross.query.weight, cross.query.bias, norm_before=norm)
    mixed = paged_attention(
        query.view(len(hidden), -1, cross.head_dim),
        kv_cache.key(cross.layer),
        kv_cache.value(cross.layer),
        batch.sources,
        cross.scale,
        None,
    )
    return mixed.flatten(1)


def _attended(
    hidden: Tensor, norm: Norm | None, attention: Any, kv_cache: Any, batch: Any
) -> Tensor:
    """[tokens, width of all heads]; writes this layer's keys and values."""
    slots = Slots(
        kv_cache.key(attention.layer), kv_cache.value(attention.layer), batch.slot_mapping
    )
    turn, qkv = None, attention.qkv
    if attention.rotary is not None:
        turn = Turn(attention.rotary.cos, attention.rotary.sin, batch.positions)
    if attention.query_norm is None:
        query = store_qkv(hidden, qkv.weight, qkv.bias, norm, slots, turn)
    else:
        fused = product(hidden, qkv.weight, qkv.bias, norm_before=norm)
        query, key, value = (
            part.view(len(hidden), -1, attention.head_dim)
            for part in torch.split(fused, attention.widths, dim=1)
        )
        query, key = (
            rms_norm(heads, own.weight, own.eps)
            for heads, own in ((query, attention.query_norm), (key, attention.key_norm))
        )
        query = place(query, key, value, slots, turn)
    mixed = attend_paged(
        query, slots.key_cache, slots.value_cache, batch.layout, attention.scale, attention.window,
        attention.bias,
    )  # fmt: skip
    return mixed.flatten(1)
