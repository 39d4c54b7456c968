"""Spans of blocks over packed texts whose rows leave as the device decides.

Every launch is made for all rows and lasts for those of its list: a block of rows that the list
does not reach ends before it reads a weight. Rows stay where they lie and are changed in place, so
nothing is gathered. Reads the parts of blocks by their names; imports none of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.kernels.block_parts import ListedStream
from multiexit_engine.kernels.matrices import Matrix, row_span
from multiexit_engine.kernels.packed_attention import PackedStarts, attend_packed
from multiexit_engine.kernels.products import product
from multiexit_engine.kernels.row_lists import RowList


def listed_linear(x: Tensor, weight: Matrix, bias: Tensor | None, listed: Any) -> Tensor:
    """See ``multiexit_engine.ops.row_lists``. One launch."""
    return product(x, weight, bias, listed=listed)


def ragged_blocks(
    hidden: Tensor,
    blocks: Sequence[Any],
    texts: Any,
    sources: Any = None,
    is_attended: bool = False,
) -> Tensor:
    """See ``multiexit_engine.ops.ragged_blocks``. 12 launches a post-norm block, 8 of encoders."""
    states = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    span = _Span(states, texts, sources, blocks[0])
    for place, block in enumerate(blocks):
        if place or not is_attended:
            span.attend(block)
        if sources is not None:
            span.read_sources(block, sources.keys_values[:, place])
        span.feed_forward(block)
    return states


class _Span(ListedStream):
    """The stream, which the rows that go on are changed in, part by part."""

    def __init__(self, states: Tensor, texts: Any, sources: Any, block: Any) -> None:
        super().__init__(states, texts.rows, block)
        self._keyed: RowList = texts.keyed
        self._own = PackedStarts(texts.query_starts, texts.starts)
        if sources is not None:
            self._read = PackedStarts(sources.query_starts, sources.starts)

    def attend(self, block: Any) -> None:
        """Keys and values of all rows of texts that go on, queries of the rows that do."""
        attention, width = block.attention, block.attention.widths[0]
        read = self.before(block, block.attention_norm, self._keyed)
        query = _span(read, attention.qkv, 0, width, self.rows)
        fused = _span(read, attention.qkv, width, 3 * width, self._keyed)
        parts = (query, *torch.split(fused, width, dim=1))
        query, key, value = (part.view(len(part), -1, attention.head_dim) for part in parts)
        mixed = attend_packed(query, key, value, self._own, attention.scale, self.rows)
        self.add(mixed.flatten(1), attention.output, block, block.attention_norm)

    def read_sources(self, block: Any, keys_values: Tensor) -> None:
        """Of [rows of sources, 2, heads, head_dim]."""
        cross, (key, value) = block.cross_attention, keys_values.unbind(1)
        read = self.before(block, block.cross_norm)
        query = product(read, cross.query.weight, cross.query.bias, listed=self.rows)
        query = query.view(len(query), -1, cross.head_dim)
        mixed = attend_packed(query, key, value, self._read, cross.scale, self.rows)
        self.add(mixed.flatten(1), cross.output, block, block.cross_norm)


def _span(x: Tensor, layer: Any, start: int, stop: int, listed: RowList) -> Tensor:
    """The product with some rows of a layer's matrix."""
    bias = None if layer.bias is None else layer.bias[start:stop]
    return product(x, row_span(layer.weight, start, stop), bias, listed=listed)
