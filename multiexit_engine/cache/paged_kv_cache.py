"""The tensors of the paged KV cache.

Knows nothing of who owns a block: that is ``block_manager``'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from multiexit_engine.transfer import to_device


class PagedKVCache:
    """Keys and values of all layers, in blocks of ``block_size`` tokens.

    A token's slot is ``block * block_size + offset``; every layer uses the same block tables.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        try:
            self._blocks = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            raise ValueError(
                f"kv_cache_memory: {num_blocks} blocks take {math.prod(shape) * dtype.itemsize} "
                f"bytes, which {str(device)!r} does not give; ask for less"
            ) from error
        self.block_size = block_size

    @cached_property
    def by_token(self) -> PagedKVCache:
        """The same memory as blocks of one token each, which have the numbers of its slots."""
        found = copy(self)
        found._blocks = self._blocks.flatten(2, 3).unsqueeze(3)
        found.block_size = 1
        return found

    @property
    def device(self) -> torch.device:
        return self._blocks.device

    @property
    def dtype(self) -> torch.dtype:
        return self._blocks.dtype

    def key(self, layer: int) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, head_dim], a view; ``layer`` is 0-based."""
        return self._blocks[layer, 0]

    def value(self, layer: int) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, head_dim], a view; ``layer`` is 0-based."""
        return self._blocks[layer, 1]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of every layer, from the first to the second of each pair."""
        if not pairs:
            return
        source, target = to_device(pairs, self._blocks.device).unbind(1)
        self._blocks.index_copy_(2, target, self._blocks.index_select(2, source))

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Memory of one block over all layers, keys and values."""
        return num_layers * 2 * block_size * num_kv_heads * head_dim * dtype.itemsize
