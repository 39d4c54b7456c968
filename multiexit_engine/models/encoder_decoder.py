"""What encoder-decoder families share: a source is encoded once, then every decoder layer reads it.

Texts lie packed: tokens of all sources one behind the other, without padding. Knows nothing of
requests or of who owns which cache block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.layers.linear import Linear
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.ops.kv import write_kv
from multiexit_engine.ops.packed_blocks import PackedTexts, packed_blocks
from multiexit_engine.ops.ragged_blocks import RaggedTexts, ragged_blocks


class Encoder(nn.Module):
    """Embedding, blocks and final norm over packed sources.

    Args:
        embedding: of token ids and positions.
        blocks: in order.
        norm: after the last block, where blocks do not end with one.
    """

    def __init__(
        self, embedding: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self._order = tuple(blocks)

    def forward(self, token_ids: Tensor, lens: Sequence[int]) -> Tensor:
        """[sum(lens)] int64 tokens of all sources to [sum(lens), hidden]."""
        hidden: Tensor = self.embedding(token_ids, packed_positions(lens, token_ids.device))
        return self._normed(packed_blocks(hidden, self._order, PackedTexts.whole(lens)), hidden)

    def ragged(self, token_ids: Tensor, positions: Tensor, texts: RaggedTexts) -> Tensor:
        """``forward`` where the device alone knows how long the sources are.

        Args:
            token_ids: [rows] int64, of all sources and of padding.
            positions: [rows] int64, in each source.
            texts: the sources, of which all rows go on.

        Returns:
            [rows, hidden]; anything for padding.
        """
        hidden: Tensor = self.embedding(token_ids, positions)
        return self._normed(ragged_blocks(hidden, self._order, texts), hidden)

    def _normed(self, found: Tensor, like: Tensor) -> Tensor:
        found = found.to(like.dtype)
        return found if self.norm is None else self.norm(found)


class EncoderDecoderModel(MultiExitModel):
    """A decoder that runs any span of its layers, and the encoder of what it reads.

    Attributes:
        encoder: reads the sources.
        cross: keys and values of all decoder layers in one matrix: layer after layer, keys first.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder,
        embedding: nn.Module,
        blocks: Sequence[nn.Module],
        heads: ExitHeads,
        cross: Linear,
    ) -> None:
        super().__init__(config, embedding, blocks, heads)
        self.encoder = encoder
        self.cross = cross

    def encode(self, token_ids: Tensor, lens: Sequence[int]) -> Tensor:
        """Read packed sources.

        Args:
            token_ids: [sum(lens)] int64.
            lens: tokens of each source, at least one each.

        Returns:
            [sum(lens), hidden]; what one source gives does not depend on the others.
        """
        hidden: Tensor = self.encoder(token_ids, lens)
        return hidden

    def cross_keys_values(self, encoded: Tensor) -> Tensor:
        """What the cross-attention of every decoder layer reads, in one product.

        Args:
            encoded: [rows, hidden] of ``encode``.

        Returns:
            [rows, layers, 2, heads, head_dim], keys before values.
        """
        config = self.config
        product: Tensor = self.cross(encoded)
        return product.view(-1, config.num_layers, 2, config.num_kv_heads, config.head_dim)

    def store_cross(self, cross: Tensor, kv_cache: PagedKVCache, slots: Tensor) -> None:
        """Store what ``cross_keys_values`` gave, row by row in the slots [rows] int64."""
        for layer in range(self.config.num_layers):
            key, value = cross[:, layer].unbind(1)
            write_kv(key, value, kv_cache.key(layer), kv_cache.value(layer), slots)


def packed_positions(lens: Sequence[int], device: torch.device) -> Tensor:
    """[sum(lens)] int64: the place of every token in its own text."""
    return torch.cat([torch.arange(count, device=device) for count in lens])


def load_cross(
    loader: TensorLoader, config: ModelConfig, names: Sequence[str], *, biased: bool
) -> Linear:
    """Keys and values of all layers as one matrix.

    Args:
        loader: of the weights.
        config: of the model.
        names: the modules of keys and values in order: layer after layer, keys first.
        biased: whether they have biases.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
    """
    width = config.num_kv_heads * config.head_dim
    rows = [width] * len(names)
    weight = loader.load_stacked([f"{n}.weight" for n in names], rows, config.hidden_size)
    bias = loader.load_stacked_biases([f"{n}.bias" for n in names], rows) if biased else None
    return Linear(weight, bias)
