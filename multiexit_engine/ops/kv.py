"""Storing keys and values in the paged cache, turned by their positions or as they are."""

from __future__ import annotations

from torch import Tensor

from multiexit_engine.ops.operands import is_plain
from multiexit_engine.ops.registry import register_op
from multiexit_engine.ops.rotary import rotary


@register_op
def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store each token's key and value in its slot; no other memory is touched.

    Args:
        key: [tokens, kv_heads, head_dim].
        value: [tokens, kv_heads, head_dim].
        key_cache: [blocks, block_size, kv_heads, head_dim], contiguous, written in place.
        value_cache: of the same shape, written in place.
        slot_mapping: [tokens] int64, ``block * block_size + offset``, all different.

    Returns:
        Nothing.

    Source: ``reshape_and_cache`` of vLLM.
    """
    key_cache.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value)


write_kv.backend("triton", "multiexit_engine.kernels.kv:write_kv", device="cuda")


@register_op
def rotate_and_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """``rotary``, then ``write_kv`` of the turned keys.

    Args:
        query: [tokens, heads, head_dim]; no heads where keys alone are wanted.
        key: [tokens, kv_heads, head_dim].
        value: of the same shape.
        cos: [positions, head_dim / 2], of every position.
        sin: of the same shape.
        positions: [tokens] int64.
        key_cache: [blocks, block_size, kv_heads, head_dim], contiguous, written in place.
        value_cache: of the same shape, written in place.
        slot_mapping: [tokens] int64, all different.

    Returns:
        The turned queries, a new tensor of the shape and dtype of ``query``.

    Source: ``rotary`` and ``write_kv``.
    """
    query, key = rotary(query, key, cos, sin, positions)
    write_kv(key, value, key_cache, value_cache, slot_mapping)
    return query


rotate_and_write_kv.backend(
    "triton",
    "multiexit_engine.kernels.rotary:rotate_and_write_kv",
    device="cuda",
    supports=lambda query, key, value, *_: is_plain(query, key, value),
)
