"""What the runner knows of a model: embed, run some layers, and its heads."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.batch import ForwardBatch
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.block import DecoderBlock
from multiexit_engine.layers.embedding import Embedding
from multiexit_engine.layers.exit_heads import ExitHeads


class MultiExitModel(nn.Module):
    """A decoder that runs any span of its layers.

    Attributes:
        config: its shape.
        heads: its own head and those of its exits.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        blocks: list[DecoderBlock],
        heads: ExitHeads,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
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
        self, hidden: Tensor, start: int, stop: int, kv_cache: PagedKVCache, batch: ForwardBatch
    ) -> Tensor:
        """Run the 0-based blocks ``start`` to ``stop - 1``.

        Args:
            hidden: [tokens, hidden], output of block ``start`` counted from 1, or ``embed``'s.
            start: first block.
            stop: end of the span.
            kv_cache: keys and values of these layers are written for all tokens of ``batch``.
            batch: the tokens.

        Returns:
            [tokens, hidden], the raw residual stream after layer ``stop`` counted from 1: the tap
            of an exit there, before any norm.
        """
        for block in self.blocks[start:stop]:
            hidden = block(hidden, kv_cache, batch)
        return hidden
