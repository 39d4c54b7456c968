"""Storing keys and values in the paged cache."""

from __future__ import annotations

from torch import Tensor

from multiexit_engine.ops.registry import register_op


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
