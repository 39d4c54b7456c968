"""Spans of pre-norm decoder blocks in few launches: six a block up to 4 rows.

Reads the parts of blocks by their names, as the CPU's front does; imports none of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.kernels.attention import paged_attention
from multiexit_engine.kernels.norms import rms_norm
from multiexit_engine.kernels.products import Norm, product
from multiexit_engine.kernels.qkv import Slots, Turn, place, store_qkv


def decoder_blocks(hidden: Tensor, blocks: Sequence[Any], kv_cache: Any, batch: Any) -> Tensor:
    """See ``multiexit_engine.ops.blocks``. The residual stream is float32 between layers."""
    hidden = hidden.float()
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        attended = _attended(hidden, _norm(block.attention_norm), attention, kv_cache, batch)
        hidden = _added(hidden, attended, attention.output)
        norm = _norm(block.mlp_norm)
        hidden = _added(hidden, _inner(hidden, norm, mlp), mlp.down)
    return hidden


def _norm(module: Any) -> Norm:
    return Norm(module.weight, getattr(module, "bias", None), module.eps)


def _added(hidden: Tensor, x: Tensor, matrix: Any) -> Tensor:
    return product(x, matrix.weight, matrix.bias, residual=hidden, dtype=torch.float32)


def _attended(hidden: Tensor, norm: Norm, attention: Any, kv_cache: Any, batch: Any) -> Tensor:
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
    mixed = paged_attention(
        query, slots.key_cache, slots.value_cache, batch.layout, attention.scale, attention.window
    )
    return mixed.flatten(1)


def _inner(hidden: Tensor, norm: Norm, mlp: Any) -> Tensor:
    """[tokens, inner width]: all of a feed-forward layer but its last matrix."""
    gate_up = getattr(mlp, "gate_up", None)
    if gate_up is None:
        return product(hidden, mlp.up.weight, mlp.up.bias, norm_before=norm, activation=mlp.kind)
    return product(
        hidden, gate_up.weight, gate_up.bias, norm_before=norm, activation=mlp.kind, gated=True
    )
