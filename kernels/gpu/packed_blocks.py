"""Spans of blocks over packed texts that see themselves whole: encoders, one-pass decoders.

Seven launches an encoder block, eleven with attention over a source. Rows that go on are gathered
before a block and put back behind it. Reads the parts of blocks by their names, as the CPU's front
does; imports none of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multiexit_engine.kernels.block_parts import PartNorm, Stream, added, inner
from multiexit_engine.kernels.matrices import row_span
from multiexit_engine.kernels.packed_attention import PackedStarts, attend_packed
from multiexit_engine.kernels.products import Norm, product


def packed_blocks(
    hidden: Tensor,
    blocks: Sequence[Any],
    texts: Any,
    sources: Any = None,
    is_attended: bool = False,
) -> Tensor:
    """See ``multiexit_engine.ops.packed_blocks``. The residual stream is float32 between layers."""
    here = _Texts.of(texts, hidden.device)
    if sources is not None:
        read = PackedStarts.of(sources.query_lens, sources.lens, hidden.device)
    stream = Stream.entering(hidden, blocks[0])
    for place, block in enumerate(blocks):
        own = stream
        if not (is_attended and place == 0):
            own = _attended(stream, block, here)
        if block.cross_attention is not None:
            own = _of_sources(own, block, sources.keys_values[:, place], read)
        norm = PartNorm(block, block.mlp_norm)
        through = inner(own.read, norm.before, block.mlp)
        own = norm.after(added(own.states, through, block.mlp.down))
        stream = own if here.rows is None else stream.replaced(here.rows, own)
    return stream.states


class _Texts(NamedTuple):
    """How texts lie, on the device.

    Attributes:
        rows: [queries] int64, those that go on; None for all.
        keyed: [keys] int64, those that give keys and values; None for all.
        starts: of the queries and of the keys of each text.
    """

    rows: Tensor | None
    keyed: Tensor | None
    starts: PackedStarts

    @classmethod
    def of(cls, texts: Any, device: torch.device) -> _Texts:
        alive = texts.alive
        keyed = None
        if len(alive) < len(texts.lens):
            keyed = torch.tensor(texts.keyed).to(device, non_blocking=True)
        counts, lens = ([each[text] for text in alive] for each in (texts.query_lens, texts.lens))
        return cls(texts.rows, keyed, PackedStarts.of(counts, lens, device))


def _attended(stream: Stream, block: Any, texts: _Texts) -> Stream:
    """The rows that go on, after their first part."""
    attention = block.attention
    norm = PartNorm(block, block.attention_norm)
    own, width, qkv = stream, attention.widths[0], attention.qkv
    if texts.rows is None:
        fused = product(stream.read, qkv.weight, qkv.bias, norm_before=norm.before)
        query, key, value = torch.split(fused, width, dim=1)
    else:
        own = stream.taken(texts.rows)
        keyed = stream.read if texts.keyed is None else stream.read[texts.keyed]
        query = _span(own.read, qkv, 0, width, norm.before)
        fused = _span(keyed, qkv, width, 3 * width, norm.before)
        key, value = torch.split(fused, width, dim=1)
    query, key, value = (_heads(part, attention.head_dim) for part in (query, key, value))
    assert texts.rows is None or attention.bias is None, "distances are those of whole texts"
    mixed = attend_packed(query, key, value, texts.starts, attention.scale, bias=attention.bias)
    return norm.after(added(own.states, mixed.flatten(1), attention.output))


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[rows, heads, head_dim], a view of columns that may lie in wider rows."""
    return x.view(len(x), -1, head_dim)


def _span(x: Tensor, layer: Any, start: int, stop: int, norm: Norm | None) -> Tensor:
    """The product with some rows of a layer's matrix."""
    bias = None if layer.bias is None else layer.bias[start:stop]
    return product(x, row_span(layer.weight, start, stop), bias, norm_before=norm)


def _of_sources(own: Stream, block: Any, keys_values: Tensor, starts: PackedStarts) -> Stream:
    """The rows after the part that reads keys and values [rows, 2, heads, head_dim]."""
    cross = block.cross_attention
    norm = PartNorm(block, block.cross_norm)
    query = product(own.read, cross.query.weight, cross.query.bias, norm_before=norm.before)
    key, value = keys_values.unbind(1)
    mixed = attend_packed(_heads(query, cross.head_dim), key, value, starts, cross.scale)
    return norm.after(added(own.states, mixed.flatten(1), cross.output))
