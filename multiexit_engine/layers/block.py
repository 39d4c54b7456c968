"""The pre-norm decoder block that all families share."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.batch import ForwardBatch
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.mlp import MLP, GatedMLP
from multiexit_engine.layers.norm import LayerNorm, RMSNorm


class DecoderBlock(nn.Module):
    """``h += attention(norm(h))``, then ``h += mlp(norm(h))``."""

    is_post_norm = False

    def __init__(
        self,
        attention_norm: LayerNorm | RMSNorm,
        attention: SelfAttention,
        mlp_norm: LayerNorm | RMSNorm,
        mlp: MLP | GatedMLP,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, hidden: Tensor, kv_cache: PagedKVCache, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] to a new tensor of this shape; writes keys and values of its layer."""
        hidden = hidden + self.attention(self.attention_norm(hidden), kv_cache, batch)
        return hidden + self.mlp(self.mlp_norm(hidden))  # type: ignore[no-any-return]

    def write_kv(
        self, hidden: Tensor, kv_cache: PagedKVCache, positions: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write keys and values of its layer only; see ``MultiExitModel.write_kv``."""
        normed = self.attention_norm(hidden).to(kv_cache.dtype)
        self.attention.write_kv(normed, kv_cache, positions, slot_mapping)
