"""Attention of a decoder's tokens over what the encoder made of the source."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.batch import ForwardBatch
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.layers.linear import Linear
from multiexit_engine.ops.attention import paged_attention
from multiexit_engine.ops.packed_attention import packed_attention
from multiexit_engine.ops.packed_blocks import PackedSources


class CrossAttention(nn.Module):
    """One block's queries and output; its keys and values are made elsewhere, once per source.

    Args:
        layer: 0-based block, which is also its place in the cache.
        query: to the width of all heads.
        output: back to the hidden size.
        head_dim: width of a head.
        scale: factor of the scores.
    """

    def __init__(
        self, layer: int, query: Linear, output: Linear, head_dim: int, scale: float
    ) -> None:
        super().__init__()
        self.layer = layer
        self.query = query
        self.output = output
        self.head_dim = head_dim
        self.scale = scale

    def queries(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, heads, head_dim]."""
        query: Tensor = self.query(hidden)
        return query.view(hidden.shape[0], -1, self.head_dim)

    def forward(self, hidden: Tensor, kv_cache: PagedKVCache, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] to the same shape; reads what was stored of each token's source."""
        assert batch.sources is not None, "sequences of an encoder-decoder have sources"
        mixed = paged_attention(
            self.queries(hidden),
            kv_cache.key(self.layer),
            kv_cache.value(self.layer),
            batch.sources,
            self.scale,
            None,
        )
        return self.output(mixed.flatten(1))  # type: ignore[no-any-return]

    def over(self, hidden: Tensor, sources: PackedSources) -> Tensor:
        """[rows, hidden] of packed texts to the same shape; ``sources`` are of this block alone."""
        key, value = sources.keys_values[:, 0].unbind(1)
        query = self.queries(hidden)
        mixed = packed_attention(query, key, value, sources.query_lens, sources.lens, self.scale)
        return self.output(mixed.flatten(1))  # type: ignore[no-any-return]
