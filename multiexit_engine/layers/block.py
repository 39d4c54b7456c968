"""The blocks that all families share: pre-norm or post-norm, of encoders and of decoders."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.batch import ForwardBatch
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.cross_attention import CrossAttention
from multiexit_engine.layers.encoder_attention import EncoderAttention, attend_packed
from multiexit_engine.layers.mlp import MLP, GatedMLP
from multiexit_engine.layers.norm import LayerNorm, RMSNorm
from multiexit_engine.ops.packed_blocks import PackedSources, PackedTexts


class Block(nn.Module):
    """Attention, perhaps attention over a source, and an MLP, each added to the stream.

    Args:
        attention_norm: as all norms, of what its part reads; or of the stream after the part was
            added to it, with ``is_post_norm``.
        attention: of the texts to themselves.
        mlp_norm: of the last part.
        mlp: the last part.
        cross_norm: of the middle part; None where the block reads no source.
        cross_attention: the middle part.
        is_post_norm: where the norms stand.

    Attributes:
        most_persistent_rows: up to so many rows, spans that begin here run in one launch; 0 where
            nobody asked for it.
    """

    most_persistent_rows = 0

    def __init__(
        self,
        attention_norm: LayerNorm | RMSNorm,
        attention: SelfAttention | EncoderAttention,
        mlp_norm: LayerNorm | RMSNorm,
        mlp: MLP | GatedMLP,
        cross_norm: LayerNorm | RMSNorm | None = None,
        cross_attention: CrossAttention | None = None,
        *,
        is_post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.cross_norm = cross_norm
        self.cross_attention = cross_attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.is_post_norm = is_post_norm

    def packed(
        self,
        hidden: Tensor,
        texts: PackedTexts,
        sources: PackedSources | None = None,
        *,
        is_attended: bool = False,
    ) -> Tensor:
        """Advance packed texts by this block; see the op ``packed_blocks``."""
        own = _going_on(hidden, texts) if is_attended else self.attended(hidden, texts)
        if self.cross_attention is not None and self.cross_norm is not None:
            assert sources is not None, "a block that reads sources is given them"
            mixed = self.cross_attention.over(self._before(self.cross_norm, own), sources)
            own = self._after(self.cross_norm, own + mixed)
        own = self._after(self.mlp_norm, own + self.mlp(self._before(self.mlp_norm, own)))
        return own if texts.rows is None else hidden.index_copy(0, texts.rows, own)

    def attended(self, hidden: Tensor, texts: PackedTexts) -> Tensor:
        """[sum(texts.query_lens), hidden]: the rows that go on, after their first part."""
        own = _going_on(hidden, texts)
        mixed = attend_packed(self.attention, self._before(self.attention_norm, hidden), texts)
        return self._after(self.attention_norm, own + mixed)

    def _before(self, norm: LayerNorm | RMSNorm, hidden: Tensor) -> Tensor:
        """What a part reads of the stream."""
        return hidden if self.is_post_norm else norm(hidden)

    def _after(self, norm: LayerNorm | RMSNorm, total: Tensor) -> Tensor:
        """The stream once a part was added to it."""
        return norm(total) if self.is_post_norm else total


class DecoderBlock(Block):
    """A block whose tokens see those before them, by way of the paged cache."""

    attention: SelfAttention

    def forward(self, hidden: Tensor, kv_cache: PagedKVCache, batch: ForwardBatch) -> Tensor:
        """[tokens, hidden] to a new tensor of this shape; writes keys and values of its layer."""
        mixed = self.attention(self._before(self.attention_norm, hidden), kv_cache, batch)
        hidden = self._after(self.attention_norm, hidden + mixed)
        if self.cross_attention is not None and self.cross_norm is not None:
            mixed = self.cross_attention(self._before(self.cross_norm, hidden), kv_cache, batch)
            hidden = self._after(self.cross_norm, hidden + mixed)
        mixed = self.mlp(self._before(self.mlp_norm, hidden))
        return self._after(self.mlp_norm, hidden + mixed)

    def write_kv(
        self, hidden: Tensor, kv_cache: PagedKVCache, positions: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write keys and values of its layer only; see ``CopiedRows``."""
        read = self._before(self.attention_norm, hidden).to(kv_cache.dtype)
        self.attention.write_kv(read, kv_cache, positions, slot_mapping)


def _going_on(hidden: Tensor, texts: PackedTexts) -> Tensor:
    """[sum(texts.query_lens), hidden]: the rows that go on."""
    return hidden if texts.rows is None else hidden[texts.rows]
