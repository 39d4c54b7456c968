"""What the runner knows of a model: embed, run some layers, and its heads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multiexit_engine.batch import ForwardBatch
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.checkpoint.families import FAMILIES
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.ops import ListedRows, decoder_blocks, listed_decoder_blocks
from multiexit_engine.quantization import Weight

logger = logging.getLogger(__name__)


class MultiExitModel(nn.Module):
    """A decoder that runs any span of its layers.

    Attributes:
        config: its shape.
        heads: its own head and those of its exits.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: nn.Module,
        blocks: Sequence[nn.Module],
        heads: ExitHeads,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        # a slice of a ModuleList is a new module, which takes longer than a small block
        self._order: tuple[Any, ...] = tuple(blocks)
        self.heads = heads

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before the first block.

        Args:
            token_ids: [tokens] int64.
            positions: [tokens] int64, 0-based in each sequence.

        Returns:
            [tokens, hidden].
        """
        hidden: Tensor = self.embedding(token_ids, positions)
        return hidden

    def run_layers(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        kv_cache: PagedKVCache,
        batch: ForwardBatch,
        then: Weight | None = None,
    ) -> Tensor:
        """Run the 0-based blocks ``start`` to ``stop - 1``.

        Args:
            hidden: [tokens, hidden], output of block ``start`` counted from 1, or ``embed``'s.
            start: first block.
            stop: end of the span.
            kv_cache: keys and values of these layers are written for all tokens of ``batch`` and
                its copied rows.
            batch: the tokens.
            then: the matrix that is read first behind these layers, if the caller knows.

        Returns:
            [tokens, hidden], the raw residual stream after layer ``stop`` counted from 1: the tap
            of an exit there, before any norm.
        """
        if start == stop:
            return hidden
        return decoder_blocks(hidden, self._order[start:stop], kv_cache, batch, then)

    def read_behind(self, layer: int) -> Weight:
        """The matrix that most steps read first behind a layer, counted from 1.

        The next layer's; of the last layer its exit's own, where that is in use, or the model's.
        """
        if layer == self.config.num_layers:
            return self.heads.last_matrix()
        weight: Weight = self._order[layer].attention.qkv.weight
        return weight

    def run_listed(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        kv_cache: PagedKVCache,
        batch: ForwardBatch,
        listed: ListedRows,
    ) -> Tensor:
        """``run_layers`` of those rows that the device lists; see ``listed_decoder_blocks``."""
        return listed_decoder_blocks(hidden, self._order[start:stop], kv_cache, batch, listed)


def load_original_head(config: ModelConfig, loader: TensorLoader, tokens: Tensor) -> Weight:
    """The matrix of the model's own head: the token embedding where they are tied.

    A quantized head is a matrix of its own; the embedding, of which a step reads a few rows only,
    is never quantized.

    A head that is stored beside a tied embedding and differs from it is used, with a warning, as
    transformers 5 does; transformers 4 ignored it.

    Args:
        config: of the model.
        loader: of its weights.
        tokens: [vocab, hidden], the token embedding.

    Returns:
        [vocab, hidden], quantized where the loader says so.

    Raises:
        CheckpointError: an untied head is missing, or is misshapen.
    """
    name = "lm_head.weight"
    if config.tie_word_embeddings and not _has_other_head(loader, name, tokens):
        if loader.quantization is None:
            return tokens
        name = FAMILIES[config.model_type].embedding
    return loader.load_weight(name, config.vocab_size, config.hidden_size)


def _has_other_head(loader: TensorLoader, name: str, tokens: Tensor) -> bool:
    if name not in loader.weights or torch.equal(loader.load(name, *tokens.shape), tokens):
        return False
    logger.warning("%s differs from the embedding that config.json ties it to; it is used", name)
    return True
