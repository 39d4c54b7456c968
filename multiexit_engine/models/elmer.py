"""ELMER: BART's weights with a decoder whose positions all see each other.

Gives the pieces of which a ragged pass is made, layer by layer and for any rows: some rows of a
sequence may stay as they are while the others go on. Knows nothing of exits' rules.

Source: Li et al. 2022, arXiv:2210.13304, and ELMER's code.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.checkpoint.checkpoint import ELMER_MARK
from multiexit_engine.config import ModelConfig
from multiexit_engine.errors import CheckpointError
from multiexit_engine.layers.block import DecoderBlock
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.layers.gate_probes import GateProbes
from multiexit_engine.models.bart import build_bart
from multiexit_engine.models.encoder_decoder import EncoderDecoderModel
from multiexit_engine.ops import (
    PackedSources,
    PackedTexts,
    RaggedSources,
    RaggedTexts,
    RowList,
    are_rows_ragged,
    embed,
    linear,
    listed_linear,
    packed_blocks,
    ragged_blocks,
)
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
        gates: the model's gate probes, if there are any.
    """

    def __init__(
        self,
        bart: EncoderDecoderModel,
        mask_token_id: int,
        concat: Tensor | None,
        gates: GateProbes,
    ) -> None:
        blocks = [cast(DecoderBlock, block) for block in bart.blocks]
        super().__init__(bart.config, bart.encoder, bart.embedding, blocks, bart.heads, bart.cross)
        self.mask_token_id = mask_token_id
        self.gates = gates
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
            attended = self._layers[0].attended(embedded, PackedTexts.whole([length]))
            self._starts[length] = Start(embedded, attended)
            if len(self._starts) > KEPT_STARTS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(length)
        return self._starts[length]

    def cross_span(self, encoded: Tensor, span: range, listed: RowList | None = None) -> Tensor:
        """Keys and values of a span of 0-based decoder layers, in one product.

        Args:
            encoded: [rows, hidden] of ``encode``.
            span: the layers.
            listed: the rows that are read; all by default.

        Returns:
            [rows, len(span), 2, heads, head_dim], keys before values; anything for other rows.
        """
        config = self.config
        width = 2 * config.num_kv_heads * config.head_dim
        rows = span.start * width, span.stop * width
        bias = None if self.cross.bias is None else self.cross.bias[slice(*rows)]
        weight = row_span(self.cross.weight, *rows)
        if listed is None:
            product = linear(encoded, weight, bias)
        else:
            product = listed_linear(encoded, weight, bias, listed)
        return product.view(-1, len(span), 2, config.num_kv_heads, config.head_dim)

    def run(
        self,
        hidden: Tensor,
        span: range,
        texts: PackedTexts,
        sources: PackedSources,
        *,
        is_attended: bool,
    ) -> Tensor:
        """Advance some rows of packed answers by a span of 0-based layers; see ``packed_blocks``.

        Args:
            hidden: [sum(texts.lens), hidden], all rows.
            span: the layers.
            texts: the answers.
            sources: keys and values of these layers, of ``cross_span``.
            is_attended: whether ``hidden`` is that of ``Start.attended``, which is layer 0's.

        Returns:
            A new tensor of the shape of ``hidden``, in its dtype or in float32.
        """
        return packed_blocks(
            hidden, self._layers[span.start : span.stop], texts, sources, is_attended
        )

    def are_waits_spared(self, hidden: Tensor) -> bool:
        """Whether ``run_ragged`` is the faster way to let rows such as these leave."""
        return are_rows_ragged(hidden, self._layers)

    def run_ragged(
        self,
        hidden: Tensor,
        span: range,
        texts: RaggedTexts,
        sources: RaggedSources,
        *,
        is_attended: bool = False,
    ) -> Tensor:
        """``run`` where the device alone knows which rows go on; see ``ragged_blocks``."""
        layers = self._layers[span.start : span.stop]
        return ragged_blocks(hidden, layers, texts, sources, is_attended)

    def feed_back(self, hidden: Tensor, token_ids: Tensor, listed: RowList | None = None) -> Tensor:
        """What the next layer reads of states and what they predict.

        Exact up to rounding: ``concat_head`` of state and embedding, its second half multiplied
        with the whole embedding beforehand.

        Args:
            hidden: [rows, hidden].
            token_ids: [rows] int64.
            listed: the rows that are read; all by default.

        Returns:
            [rows, hidden]; anything for other rows.
        """
        states, table = self._feedback
        if listed is None:
            product = linear(hidden, states, None)
        else:
            product = listed_linear(hidden, states, None, listed)
        places = torch.arange(len(hidden), device=hidden.device)
        return embed(token_ids, places, table, product, 1.0)

    def predict(self, hidden: Tensor) -> HeadOperands:
        """The model's own head on states after any layer; its logits have the bias."""
        return self.heads.operands(self.heads.original, hidden)

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
    gates = GateProbes(config, loader)
    return ElmerModel(build_bart(config, loader), _mask_token_id(config), concat, gates)


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
