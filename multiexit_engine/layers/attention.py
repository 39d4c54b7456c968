"""Self-attention over the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multiexit_engine.batch import ForwardBatch
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.linear import Linear
from multiexit_engine.layers.norm import RMSNorm
from multiexit_engine.layers.rotary import Rotary
from multiexit_engine.ops.attention import paged_attention
from multiexit_engine.ops.biased_attention import biased_paged_attention
from multiexit_engine.ops.kv import rotate_and_write_kv, write_kv
from multiexit_engine.ops.linear import linear
from multiexit_engine.quantization import Weight, row_span


class SelfAttention(nn.Module):
    """One block's attention: projects, stores keys and values, attends, projects back.

    Args:
        config: for the shape and the layer's window.
        layer: 0-based block, which is also its place in the cache.
        qkv: queries, keys and values in one matrix, in this order.
        output: back to the hidden size.
        scale: factor of the scores.
        rotary: turns queries and keys, where positions are not in the embedding.
        query_norm: of each query head, before the rotation.
        key_norm: of each key head, before the rotation.
        bias: [heads, reach] for distances, as ``biased_paged_attention`` wants it.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        qkv: Linear,
        output: Linear,
        scale: float,
        rotary: Rotary | None = None,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bias = bias
        self.layer = layer
        self.head_dim = config.head_dim
        self.widths = [n * config.head_dim for n in (config.num_heads, *2 * (config.num_kv_heads,))]
        self.window = config.attention_windows[layer]
        self.scale = scale
        self.qkv = qkv
        self.output = output
        self.rotary = rotary
        self.query_norm = query_norm
        self.key_norm = key_norm

    def key_value_operands(self) -> tuple[Weight, Tensor | None]:
        """The rows of the projection that give keys and values, and their bias."""
        first = self.widths[0]
        bias = None if self.qkv.bias is None else self.qkv.bias[first:]
        return row_span(self.qkv.weight, first, sum(self.widths)), bias

    def write_kv(
        self, hidden: Tensor, kv_cache: PagedKVCache, positions: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write this layer's keys and values of some rows; nothing attends.

        Args:
            hidden: [tokens, hidden], what the projection reads, in the dtype of the weights.
            kv_cache: is written.
            positions: [tokens] int64, 0-based in each sequence.
            slot_mapping: [tokens] int64, ``block * block_size + offset``.
        """
        fused = linear(hidden, *self.key_value_operands())
        key, value = (
            part.view(len(hidden), -1, self.head_dim)
            for part in torch.split(fused, self.widths[1:], dim=-1)
        )
        if self.key_norm is not None:
            key = self.key_norm(key)
        self._place(key[:, :0], key, value, kv_cache, positions, slot_mapping)

    def forward(self, hidden: Tensor, kv_cache: PagedKVCache, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] to the same shape; writes this layer's keys and values."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in self.qkv(hidden).split(self.widths, dim=-1)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = self._place(query, key, value, kv_cache, batch.positions, batch.slot_mapping)
        key_cache, value_cache = kv_cache.key(self.layer), kv_cache.value(self.layer)
        if self.bias is None:
            attended = paged_attention(
                query, key_cache, value_cache, batch.layout, self.scale, self.window
            )
        else:
            attended = biased_paged_attention(
                query, key_cache, value_cache, batch.layout, self.scale, self.bias
            )
        return self.output(attended.flatten(1))  # type: ignore[no-any-return]

    def _place(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: PagedKVCache,
        positions: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """The queries as attention reads them; keys and values are written."""
        caches = kv_cache.key(self.layer), kv_cache.value(self.layer)
        if self.rotary is None:
            write_kv(key, value, *caches, slot_mapping)
            return query
        cos, sin = self.rotary.cos, self.rotary.sin
        return rotate_and_write_kv(query, key, value, cos, sin, positions, *caches, slot_mapping)
