"""Self-attention without order and without a cache: every token sees its whole text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.linear import Linear
from multiexit_engine.ops.biased_attention import biased_packed_attention
from multiexit_engine.ops.linear import linear
from multiexit_engine.ops.packed_attention import packed_attention
from multiexit_engine.ops.packed_blocks import PackedTexts
from multiexit_engine.quantization import Weight, row_span


class EncoderAttention(nn.Module):
    """The weights of one encoder block's attention, for ``attend_packed``.

    Args:
        qkv: queries, keys and values in one matrix, in this order and of equal widths.
        output: back to the hidden size.
        head_dim: width of a head.
        scale: factor of the scores.
        bias: [heads, 2 * reach + 1] for distances, as ``biased_packed_attention`` wants it; None
            where positions are in the embedding.
    """

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        head_dim: int,
        scale: float,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bias = bias
        self.qkv = qkv
        self.output = output
        self.widths = [qkv.weight.shape[0] // 3] * 3
        self.head_dim = head_dim
        self.scale = scale


def attend_packed(
    attention: EncoderAttention | SelfAttention, hidden: Tensor, texts: PackedTexts
) -> Tensor:
    """What the rows that go on read of their texts, projected back.

    Args:
        attention: whose weights; a bias for distances asks for texts of which all rows go on.
        hidden: [sum(texts.lens), hidden], what the projection reads.
        texts: whose rows.

    Returns:
        [sum(texts.query_lens), hidden].
    """
    qkv, width, head_dim = attention.qkv, attention.widths[0], attention.head_dim
    if texts.rows is None:
        product = qkv(hidden)
        query, rest = product[:, :width], product[:, width:]
    else:
        query = linear(hidden[texts.rows], *_span_of(qkv, 0, width))
        keyed = hidden
        if len(texts.alive) < len(texts.lens):
            keyed = hidden[torch.tensor(texts.keyed).to(hidden.device, non_blocking=True)]
        rest = linear(keyed, *_span_of(qkv, width, 3 * width))
    query, key, value = (
        part.unflatten(-1, (-1, head_dim)) for part in (query, rest[:, :width], rest[:, width:])
    )
    lens = [texts.lens[text] for text in texts.alive]
    if attention.bias is None:
        counts = [texts.query_lens[text] for text in texts.alive]
        mixed = packed_attention(query, key, value, counts, lens, attention.scale)
    else:
        assert texts.rows is None, "distances are those of whole texts"
        mixed = biased_packed_attention(query, key, value, lens, attention.scale, attention.bias)
    return attention.output(mixed.flatten(1))  # type: ignore[no-any-return]


def _span_of(layer: Linear, start: int, stop: int) -> tuple[Weight, Tensor | None]:
    bias = None if layer.bias is None else layer.bias[start:stop]
    return row_span(layer.weight, start, stop), bias
