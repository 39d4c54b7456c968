"""Spans of decoder blocks in few launches: six a pre-norm block up to 4 rows.

Reads the parts of blocks by their names, as the CPU's front does; imports none of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.kernels.attention import attend_paged
from multiexit_engine.kernels.block_parts import PartNorm, Stream, added, inner, inner_matrix
from multiexit_engine.kernels.matrices import Matrix
from multiexit_engine.kernels.norms import rms_norm
from multiexit_engine.kernels.products import Norm, product
from multiexit_engine.kernels.qkv import Slots, Turn, place, store_qkv


def decoder_blocks(
    hidden: Tensor, blocks: Sequence[Any], kv_cache: Any, batch: Any, then: Matrix | None = None
) -> Tensor:
    """See ``multiexit_engine.ops.blocks``. The residual stream is float32 between layers."""
    stream = Stream.entering(hidden, blocks[0])
    coming = Coming(blocks, then)
    for block in blocks:
        attention, cross, mlp = block.attention, block.cross_attention, block.mlp
        norm = PartNorm(block, block.attention_norm)
        attended = _attended(stream.read, norm.before, attention, kv_cache, batch, coming)
        stream = norm.after(added(stream.states, attended, attention.output, coming.next()))
        if cross is not None:
            norm = PartNorm(block, block.cross_norm)
            mixed = _of_sources(stream.read, norm.before, cross, kv_cache, batch, coming)
            stream = norm.after(added(stream.states, mixed, cross.output, coming.next()))
        norm = PartNorm(block, block.mlp_norm)
        through = inner(stream.read, norm.before, mlp, ahead=coming.next())
        stream = norm.after(added(stream.states, through, mlp.down, coming.next()))
    return stream.states


class Coming:
    """The matrices of a span in the order of its launches, and the one read behind it.

    A launch asks for what the launch after the next one reads, so that it is in L2 by then.
    Attention has none.
    """

    def __init__(self, blocks: Sequence[Any], then: Matrix | None = None) -> None:
        self._matrices = [matrix for block in blocks for matrix in _matrices(block)] + [then]
        self._place = 0

    def next(self) -> Matrix | None:
        """What the launch at this place asks for; the place goes on."""
        self._place += 1
        later = self._place + 1
        return self._matrices[later] if later < len(self._matrices) else None


def _matrices(block: Any) -> list[Matrix | None]:
    """Of one block, in the order of its launches."""
    attention, cross = block.attention, block.cross_attention
    matrices = [attention.qkv.weight, None, attention.output.weight]
    if cross is not None:
        matrices += [cross.query.weight, None, cross.output.weight]
    return [*matrices, inner_matrix(block.mlp).weight, block.mlp.down.weight]


def _of_sources(
    hidden: Tensor, norm: Norm | None, cross: Any, kv_cache: Any, batch: Any, coming: Coming
) -> Tensor:
    """[tokens, width of all heads]; reads what was stored of each token's source."""
    query = product(
        hidden, cross.query.weight, cross.query.bias, norm_before=norm, ahead=coming.next()
    )
    mixed = attend_paged(
        query.view(len(hidden), -1, cross.head_dim),
        kv_cache.key(cross.layer),
        kv_cache.value(cross.layer),
        batch.sources,
        cross.scale,
        None,
        None,
        coming.next(),
    )
    return mixed.flatten(1)


def _attended(
    hidden: Tensor, norm: Norm | None, attention: Any, kv_cache: Any, batch: Any, coming: Coming
) -> Tensor:
    """[tokens, width of all heads]; writes this layer's keys and values."""
    slots = Slots(
        kv_cache.key(attention.layer), kv_cache.value(attention.layer), batch.slot_mapping
    )
    turn, qkv = None, attention.qkv
    if attention.rotary is not None:
        turn = Turn(attention.rotary.cos, attention.rotary.sin, batch.positions)
    if attention.query_norm is None:
        query = store_qkv(hidden, qkv.weight, qkv.bias, norm, slots, turn, coming.next())
    else:
        fused = product(hidden, qkv.weight, qkv.bias, norm_before=norm, ahead=coming.next())
        query, key, value = (
            part.view(len(hidden), -1, attention.head_dim)
            for part in torch.split(fused, attention.widths, dim=1)
        )
        query, key = (
            rms_norm(heads, own.weight, own.eps)
            for heads, own in ((query, attention.query_norm), (key, attention.key_norm))
        )
        query = place(query, key, value, slots, turn)
    mixed = attend_paged(
        query, slots.key_cache, slots.value_cache, batch.layout, attention.scale, attention.window,
        attention.bias, coming.next(),
    )  # fmt: skip
    return mixed.flatten(1)
