"""ELMER: BART's weights with a decoder whose positions all see each other.

Gives the pieces of which a ragged pass is made, layer by layer and for any rows: some rows of a
sequence may stay as they are while the others go on. Knows nothing of exits' rules.

Source: Li et al. 2022, arXiv:2210.13304, and ELMER's code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.checkpoint.checkpoint import ELMER_MARK
from multiexit_engine.config import ModelConfig
from multiexit_engine.errors import CheckpointError
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.models.bart import BartDecoderBlock, build_bart
from multiexit_engine.models.encoder_decoder import EncoderDecoderModel
from multiexit_engine.ops import CodedHead, are_codes_fast, code_head, linear, packed_attention
from multiexit_engine.quantization import row_span

KEPT_STARTS = 64


class Start(NamedTuple):
    """What the decoder begins with at one length; it depends on nothing else.

    Attributes:
        embedded: [length, hidden], [BOS] and then [MASK] everywhere.
        attended: [length, hidden], after the self-attention of the first layer.
    """

    embedded: Tensor
    attended: Tensor


class ElmerModel(EncoderDecoderModel):
    """An encoder, and a decoder that computes any rows of packed sequences, layer by layer.

    Args:
        bart: the model of the same weights.
        mask_token_id: stands in the decoder's input wherever a token is to be found.
        concat: [hidden, 2 * hidden] of the feedback, of state and embedding; None where the
            checkpoint has none.
    """

    def __init__(
        self, bart: EncoderDecoderModel, mask_token_id: int, concat: Tensor | None
    ) -> None:
        blocks = [cast(BartDecoderBlock, block) for block in bart.blocks]
        super().__init__(bart.config, bart.encoder, bart.embedding, blocks, bart.heads, bart.cross)
        self.mask_token_id = mask_token_id
        self._layers = blocks
        self._concat = concat
        self._starts: OrderedDict[int, Start] = OrderedDict()

    @property
    def has_feedback(self) -> bool:
        """Whether the checkpoint has the weights that feed predictions to the next layer."""
        return self._concat is not None

    def start(self, length: int) -> Start:
        """The first rows of a sequence; made once for a length, kept for the latest ones."""
        if length not in self._starts:
            device = self._tokens.device
            token_ids = torch.full((length,), self.mask_token_id, device=device)
            token_ids[0] = self.config.bos_token_id or 0
            embedded = self.embed(token_ids, torch.arange(length, device=device))
            self._starts[length] = Start(
                embedded, self.self_attend(0, embedded, None, [length], [length])
            )
            if len(self._starts) > KEPT_STARTS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(length)
        return self._starts[length]

    def cross_span(self, encoded: Tensor, start: int, stop: int) -> Tensor:
        """Keys and values of the decoder layers ``start`` to ``stop - 1``, in one product.

        Args:
            encoded: [rows, hidden] of ``encode``.
            start: first 0-based layer.
            stop: end of the span.

        Returns:
            [rows, stop - start, 2, heads, head_dim], keys before values.
        """
        config = self.config
        width = 2 * config.num_kv_heads * config.head_dim
        rows = start * width, stop * width
        bias = None if self.cross.bias is None else self.cross.bias[slice(*rows)]
        product = linear(encoded, row_span(self.cross.weight, *rows), bias)
        return product.view(-1, stop - start, 2, config.num_kv_heads, config.head_dim)

    def self_attend(
        self,
        layer: int,
        hidden: Tensor,
        rows: Tensor | None,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
    ) -> Tensor:
        """The first third of a layer for some rows of packed sequences.

        Args:
            layer: 0-based.
            hidden: [sum(key_lens), hidden], all rows; each gives its key and value.
            rows: [sum(query_lens)] int64, those that go on, ascending; None for all.
            query_lens: how many of each sequence go on.
            key_lens: rows of each sequence.

        Returns:
            [sum(query_lens), hidden].
        """
        block = self._layers[layer]
        attention = block.attention
        width = attention.widths[0]
        weight, bias = attention.qkv.weight, attention.qkv.bias
        assert bias is not None, "BART's projections have biases"
        if rows is None:
            own = hidden
            product = attention.qkv(hidden)
            query, rest = product[:, :width], product[:, width:]
        else:
            own = hidden[rows]
            query = linear(own, row_span(weight, 0, width), bias[:width])
            rest = linear(hidden, row_span(weight, width, 3 * width), bias[width:])
        key, value = rest[:, :width], rest[:, width:]
        query, key, value = (
            part.unflatten(-1, (-1, attention.head_dim)) for part in (query, key, value)
        )
        mixed = packed_attention(query, key, value, query_lens, key_lens, attention.scale)
        return block.attention_norm(own + attention.output(mixed.flatten(1)))  # type: ignore[no-any-return]

    def read_source(
        self,
        layer: int,
        hidden: Tensor,
        key: Tensor,
        value: Tensor,
        query_lens: Sequence[int],
        source_lens: Sequence[int],
    ) -> Tensor:
        """The rest of a layer: cross-attention and MLP.

        Args:
            layer: 0-based.
            hidden: [sum(query_lens), hidden] of ``self_attend``.
            key: [sum(source_lens), heads, head_dim].
            value: of the shape of ``key``.
            query_lens: rows that read each source.
            source_lens: rows of each source.

        Returns:
            [sum(query_lens), hidden], the states after the layer.
        """
        block = self._layers[layer]
        mixed = block.cross_attention.over(hidden, key, value, query_lens, source_lens)
        return block.feed_forward(block.cross_norm(hidden + mixed))

    def feed_back(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """What the next layer reads of states and what they predict.

        Exact up to rounding: ``concat_head`` of state and embedding, its second half multiplied
        with the whole embedding beforehand.

        Args:
            hidden: [rows, hidden].
            token_ids: [rows] int64.

        Returns:
            [rows, hidden].
        """
        states, table = self._feedback
        return linear(hidden, states, None) + functional.embedding(token_ids, table)

    def predict(self, hidden: Tensor) -> HeadOperands:
        """The model's own head on states after any layer; its logits have the bias."""
        return self.heads.operands(self.heads.original, hidden)

    @cached_property
    def coded_head(self) -> CodedHead | None:
        """The head in 8-bit codes, made when first asked for; None where exact is faster."""
        weight = self.predict(self._tokens[:1]).weight
        if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not are_codes_fast():
            return None
        return code_head(weight) if weight.dtype is torch.float32 else None

    @property
    def _tokens(self) -> Tensor:
        return cast(Tensor, self.embedding.tokens)

    @cached_property
    def _feedback(self) -> tuple[Tensor, Tensor]:
        """[hidden, hidden] for states, and [vocab, hidden] for tokens."""
        assert self._concat is not None, "asked for by has_feedback"
        states, tokens = self._concat.chunk(2, dim=1)
        return states.contiguous(), linear(self._tokens, tokens.contiguous(), None)


def build_elmer(config: ModelConfig, loader: TensorLoader) -> ElmerModel:
    """Load an ELMER model; raises CheckpointError when a tensor is missing or misshapen."""
    if config.bos_token_id is None:
        raise CheckpointError("config.json has no bos_token_id: ELMER's decoder begins with it")
    concat = None
    if ELMER_MARK in loader.weights:
        concat = loader.load(ELMER_MARK, config.hidden_size, 2 * config.hidden_size)
    return ElmerModel(build_bart(config, loader), _mask_token_id(config), concat)


def _mask_token_id(config: ModelConfig) -> int:
    """What config.json says, else the last token, as in BART's vocabulary."""
    stated = config.family.get("mask_token_id")
    if stated is None:
        return config.vocab_size - 1
    if not isinstance(stated, int) or not 0 <= stated < config.vocab_size:
        raise CheckpointError(
            f"mask_token_id={stated!r} in config.json: must be one of 0..{config.vocab_size - 1}"
        )
    return stated
