"""Decoder blocks, a whole span of them in one call.

Reads the modules of ``multiexit_engine.layers`` by their attributes and imports none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.attention import layout_view
from multiexit_engine._native.tensors import ACTIVATIONS, DTYPES, address, by_place, matrix, vector
from multiexit_engine.quantization import Weight


class _Views:
    """Blocks as the extension sees them, with all that its addresses point into but weights."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._kept: list[Tensor | None] = []
        self.blocks = [self._block(block) for block in blocks]

    def _block(self, block: Any) -> _C.Block:
        attention, mlp = block.attention, block.mlp
        # an encoder's attention has none of these
        rotary, window = getattr(attention, "rotary", None), getattr(attention, "window", None)
        is_gated = hasattr(mlp, "gate_up")
        return _C.Block(
            is_post_norm=block.is_post_norm,
            attention_norm=self._norm(block.attention_norm),
            qkv=self._linear(attention.qkv),
            query_norm=self._norm(getattr(attention, "query_norm", None)),
            key_norm=self._norm(getattr(attention, "key_norm", None)),
            cos=0 if rotary is None else self._keep(rotary.cos),
            sin=0 if rotary is None else self._keep(rotary.sin),
            heads=attention.widths[0] // attention.head_dim,
            kv_heads=attention.widths[1] // attention.head_dim,
            head_dim=attention.head_dim,
            scale=attention.scale,
            window=window or 0,
            bias=self._bias(attention),
            output=self._linear(attention.output),
            mlp_norm=self._norm(block.mlp_norm),
            up=self._linear(mlp.gate_up if is_gated else mlp.up),
            is_gated=is_gated,
            activation=ACTIVATIONS[mlp.kind],
            down=self._linear(mlp.down),
            cross=None if block.cross_attention is None else self._cross(block),
        )

    def _bias(self, attention: Any) -> _C.DistanceBias:
        bias: Tensor | None = attention.bias
        if bias is None:
            return _C.DistanceBias()
        # a decoder has none for keys behind their query
        after = 0 if hasattr(attention, "layer") else bias.shape[1] // 2
        return _C.DistanceBias(self._keep(by_place(bias)), bias.shape[1] - 1 - after, after)

    def _cross(self, block: Any) -> _C.CrossAttention:
        cross = block.cross_attention
        return _C.CrossAttention(
            self._norm(block.cross_norm),
            self._linear(cross.query),
            self._linear(cross.output),
            cross.scale,
        )

    def _keep(self, values: Tensor | None) -> int:
        """The address of the float32 form, which lives as long as this."""
        kept = vector(values)
        self._kept.append(kept)
        return address(kept)

    def _norm(self, norm: Any) -> _C.Norm:
        if norm is None:
            return _C.Norm(0, 0, 0.0)
        return _C.Norm(self._keep(norm.weight), self._keep(getattr(norm, "bias", None)), norm.eps)

    def _linear(self, linear: Any) -> _C.Linear:
        return _C.Linear(matrix(linear.weight), self._keep(linear.bias))


class _Span:
    """Blocks with their parts of a cache; keeps both alive."""

    def __init__(self, blocks: Sequence[Any], kv_cache: Any) -> None:
        self._kept = [*blocks], _Views(blocks)
        caches = [
            self._cache(kv_cache.key(i), kv_cache.value(i))
            for i in (block.attention.layer for block in blocks)
        ]
        self.view = _C.Span(self._kept[1].blocks, caches)

    def _cache(self, key: Tensor, value: Tensor) -> _C.Cache:
        return _C.Cache(key.data_ptr(), value.data_ptr(), DTYPES[key.dtype], *key.shape[1:])


_spans: WeakKeyDictionary[Any, dict[tuple[int, int], _Span]] = WeakKeyDictionary()
_views: WeakKeyDictionary[Any, _Views] = WeakKeyDictionary()


def decoder_blocks(
    hidden: Tensor, blocks: Sequence[Any], kv_cache: Any, batch: Any, then: Weight | None = None
) -> Tensor:
    """See ``multiexit_engine.ops.decoder_blocks``. Asks for nothing ahead."""
    spans = _spans.get(kv_cache)
    if spans is None:
        spans = _spans[kv_cache] = {}
    # A span keeps its blocks, so their ids stay theirs.
    key = id(blocks[0]), len(blocks)
    span = spans.get(key)
    if span is None:
        span = spans[key] = _Span(blocks, kv_cache)
    # float32 between spans, too: where the layers are cut must not round anything
    hidden = hidden.float().contiguous()
    out = torch.empty_like(hidden)
    kept, copied = _copied(batch.copied)
    rows = _C.Rows(
        layout_view(batch.layout),
        batch.positions.data_ptr(),
        batch.slot_mapping.data_ptr(),
        None if batch.sources is None else layout_view(batch.sources),
        copied,
    )
    _C.decoder_blocks(
        torch.get_num_threads(),
        span.view,
        rows,
        hidden.data_ptr(),
        out.data_ptr(),
        DTYPES[hidden.dtype],
    )
    del kept  # not before: the extension reads it
    return out


def _copied(rows: Any) -> tuple[Tensor | None, _C.CopiedRows | None]:
    """The extension's view of CopiedRows, and the states that must outlive it."""
    if rows is None:
        return None, None
    states = rows.states.float().contiguous()
    places = address(rows.positions), address(rows.slot_mapping)
    return states, _C.CopiedRows(len(states), address(states), *places)


def packed_blocks(
    hidden: Tensor,
    blocks: Sequence[Any],
    texts: Any,
    sources: Any = None,
    is_attended: bool = False,
) -> Tensor:
    """See ``multiexit_engine.ops.packed_blocks``."""
    for block in blocks:
        if block not in _views:
            _views[block] = _Views([block])
    views = [_views[block].blocks[0] for block in blocks]
    assert texts.rows is None or blocks[0].attention.bias is None, "distances are of whole texts"
    hidden = hidden.contiguous()
    out = torch.empty(hidden.shape, dtype=torch.float32)
    rows = None if texts.rows is None else texts.rows.contiguous()
    read = keys_values = None
    if sources is not None:
        keys_values = sources.keys_values.float()
        if keys_values[0].numel() and not keys_values[0].is_contiguous():
            keys_values = keys_values.contiguous()
        read = _C.PackedSources(
            keys_values.data_ptr(),
            keys_values.stride(0),
            list(sources.lens),
            list(sources.query_lens),
        )
    _C.packed_blocks(
        torch.get_num_threads(),
        views,
        _C.PackedTexts(list(texts.lens), list(texts.query_lens), address(rows)),
        read,
        is_attended,
        hidden.data_ptr(),
        DTYPES[hidden.dtype],
        out.data_ptr(),
    )
    return out
