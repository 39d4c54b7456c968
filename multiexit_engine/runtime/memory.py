"""How large the KV pool is."""

from __future__ import annotations

import os

import torch

from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import ModelConfig

SHARE_OF_FREE_CPU_MEMORY = 0.25
SHARE_OF_FREE_GPU_MEMORY = 0.85


def num_kv_blocks(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    max_model_len: int,
    max_batch_size: int,
    kv_cache_memory: int | None,
) -> int:
    """Blocks of the pool.

    With ``kv_cache_memory`` (bytes) as many as fit into it. Without, enough for ``max_batch_size``
    sequences of full length, but at most a share of the memory that is free now.

    Raises:
        ValueError: the memory is too small for a single block.
    """
    block_bytes = PagedKVCache.bytes_per_block(
        model.num_layers, block_size, model.num_kv_heads, model.head_dim, dtype
    )
    if kv_cache_memory is not None:
        count = kv_cache_memory // block_bytes
        if count < 1:
            raise ValueError(
                f"kv_cache_memory={kv_cache_memory}: one block of {block_size} tokens takes "
                f"{block_bytes} bytes"
            )
        return count
    blocks_per_sequence = -(-max_model_len // block_size)
    if model.encoder is not None:
        blocks_per_sequence += -(-model.encoder.max_source_len // block_size)
    affordable = _free_bytes(device) // block_bytes
    return max(blocks_per_sequence, min(max_batch_size * blocks_per_sequence, affordable))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * SHARE_OF_FREE_GPU_MEMORY)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free * SHARE_OF_FREE_CPU_MEMORY)
