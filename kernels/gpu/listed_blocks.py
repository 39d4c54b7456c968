"""Spans of decoder blocks for those rows that go on as the device decides.

Every launch is made for all rows and lasts for those of its list. Rows stay where they lie and are
changed in place; each attends as a sequence of its own. Reads the parts of blocks by their names;
imports none of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.kernels.attention import ListedSequences, attend_paged
from multiexit_engine.kernels.block_parts import ListedStream
from multiexit_engine.kernels.norms import rms_norm
from multiexit_engine.kernels.products import product
from multiexit_engine.kernels.qkv import Slots, Turn, place, store_qkv
from multiexit_engine.kernels.row_lists import RowList


def listed_decoder_blocks(
    hidden: Tensor, blocks: Sequence[Any], kv_cache: Any, batch: Any, listed: Any
) -> Tensor:
    """See ``multiexit_engine.ops.listed_blocks``. Eight launches a block, thirteen with a source.

    Five more where some rows only give keys and values, two more with norms of heads, and one
    more with quantized weights.
    """
    states = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    span = _Span(states, kv_cache, batch, listed, blocks[0])
    for block in blocks:
        if listed.copied is not None:
            span.copy_keys_values(block)
        span.attend(block)
        if block.cross_attention is not None:
            span.read_sources(block)
        span.feed_forward(block)
    return states


class _Span(ListedStream):
    """The stream, which the rows that go on are changed in, part by part."""

    def __init__(self, states: Tensor, kv_cache: Any, batch: Any, listed: Any, block: Any) -> None:
        super().__init__(states, listed.running, block)
        self._kv_cache = kv_cache
        self._batch = batch
        self._copied: RowList | None = listed.copied
        self._only = ListedSequences(listed.running, listed.tables)
        self._spare_slot: int = listed.spare_slot
        self._masked: dict[int, Tensor] = {}

    def copy_keys_values(self, block: Any) -> None:
        """Keys and values of rows that give nothing else, from the states that they have."""
        attention, copied = block.attention, self._copied
        assert copied is not None, "there are such rows"
        read = self.before(block, block.attention_norm, copied)
        fused = product(read, *attention.key_value_operands(), listed=copied)
        parts = torch.split(fused, attention.widths[1:], dim=1)
        key, value = (part.view(len(part), -1, attention.head_dim) for part in parts)
        if attention.key_norm is not None:
            key = rms_norm(key, attention.key_norm.weight, attention.key_norm.eps)
        place(key[:, :0], key, value, self._slots(attention, copied), self._turn(attention))

    def attend(self, block: Any) -> None:
        """Write keys and values, attend, and add what was found to the stream."""
        attention = block.attention
        read = self.before(block, block.attention_norm)
        query = self._stored(read, attention)
        caches = self._kv_cache.key(attention.layer), self._kv_cache.value(attention.layer)
        mixed = attend_paged(
            query,
            *caches,
            self._batch.layout,
            attention.scale,
            attention.window,
            attention.bias,
            only=self._only,
        )
        self.add(mixed.flatten(1), attention.output, block, block.attention_norm)

    def read_sources(self, block: Any) -> None:
        """Attend over what was stored of each row's source, and add what was found."""
        cross = block.cross_attention
        read = self.before(block, block.cross_norm)
        query = product(read, cross.query.weight, cross.query.bias, listed=self.rows)
        mixed = attend_paged(
            query.view(len(query), -1, cross.head_dim),
            self._kv_cache.key(cross.layer),
            self._kv_cache.value(cross.layer),
            self._batch.sources,
            cross.scale,
            None,
            None,
            only=self._only,
        )
        self.add(mixed.flatten(1), cross.output, block, block.cross_norm)

    def _stored(self, read: Tensor, attention: Any) -> Tensor:
        """[rows, heads, head_dim] queries; keys and values are written."""
        qkv, turn = attention.qkv, self._turn(attention)
        if attention.query_norm is None and isinstance(qkv.weight, Tensor):
            caches = self._kv_cache.key(attention.layer), self._kv_cache.value(attention.layer)
            slots = Slots(*caches, self._batch.slot_mapping)
            return store_qkv(read, qkv.weight, qkv.bias, None, slots, turn, listed=self.rows)
        fused = product(read, qkv.weight, qkv.bias, listed=self.rows)
        parts = torch.split(fused, attention.widths, dim=1)
        query, key, value = (part.view(len(part), -1, attention.head_dim) for part in parts)
        if attention.query_norm is not None:
            query, key = (
                rms_norm(heads, own.weight, own.eps)
                for heads, own in ((query, attention.query_norm), (key, attention.key_norm))
            )
        return place(query, key, value, self._slots(attention, self.rows), turn)

    def _slots(self, attention: Any, listed: RowList) -> Slots:
        """Where the listed rows write, and the others where nobody reads."""
        if id(listed) not in self._masked:
            mapping = torch.where(listed.marks(), self._batch.slot_mapping, self._spare_slot)
            self._masked[id(listed)] = mapping
        caches = self._kv_cache.key(attention.layer), self._kv_cache.value(attention.layer)
        return Slots(*caches, self._masked[id(listed)])

    def _turn(self, attention: Any) -> Turn | None:
        if attention.rotary is None:
            return None
        return Turn(attention.rotary.cos, attention.rotary.sin, self._batch.positions)
