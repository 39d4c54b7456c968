"""What a layer's attention begins with: norm, queries, keys and values, rotation, the cache.

One launch up to 64 rows; two for more, and for quantized weights. Knows nothing of who owns a
cache block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.kernels.kv import write_kv
from multiexit_engine.kernels.matrices import Matrix
from multiexit_engine.kernels.overlap import fetched, overlapped
from multiexit_engine.kernels.products import MAX_ROWS, Norm, cut, norm_kind, product, ready
from multiexit_engine.kernels.qkv_tiles import qkv_kernel
from multiexit_engine.kernels.rotary import rotate_and_write_kv
from multiexit_engine.kernels.row_lists import RowList


class Slots(NamedTuple):
    """Where keys and values go: both caches, and [rows] int64 of their slots."""

    key_cache: Tensor
    value_cache: Tensor
    mapping: Tensor


class Turn(NamedTuple):
    """Cosines and sines [positions, head_dim / 2] of every position, and [rows] int64 positions."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


def store_qkv(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    norm_before: Norm | None,
    slots: Slots,
    turn: Turn | None,
    ahead: Matrix | None = None,
    listed: RowList | None = None,
) -> Tensor:
    """Queries, with keys and values written to their slots.

    Args:
        x: [rows, in_features], in the dtype of the weights, or float32.
        weight: [query width + 2 * key-value width, in_features], contiguous.
        bias: of its rows, or None.
        norm_before: of x.
        slots: of this layer, in the dtype of the weights.
        turn: of queries and keys; None where positions are in the embedding.
        ahead: a matrix of a later launch, whose first bytes are asked for meanwhile.
        listed: the rows that have any; all by default. Only of plain matrices; a norm of listed
            rows is a launch of its own.

    Returns:
        [rows, heads, head_dim] in the dtype of the weights; anything in rows that are not listed.
    """
    kv_heads, head_dim = slots.key_cache.shape[2:]
    kv_width = kv_heads * head_dim
    query_width = weight.shape[0] - 2 * kv_width
    rows, width = x.shape
    if listed is None and (rows > MAX_ROWS or not isinstance(weight, Tensor)):
        fused = product(x, weight, bias, norm_before=norm_before).view(rows, -1, head_dim)
        heads = [query_width // head_dim, kv_heads, kv_heads]
        query, key, value = torch.split(fused, heads, dim=1)
        return place(query, key, value, slots, turn)
    assert isinstance(weight, Tensor), "codes are multiplied above"
    if listed is None:
        x, norm_before = ready(x, weight, norm_before)
    query = torch.empty(rows, query_width // head_dim, head_dim, dtype=weight.dtype,
                        device=x.device)  # fmt: skip
    if not rows:
        return query
    how = cut(x, weight.shape[0], weight.dtype, turn is not None, listed is not None)
    gain, shift, eps = norm_before or (None, None, 0.0)
    cos, sin, positions = turn or (None, None, None)
    qkv_kernel[how.grid](
        x, weight, bias, gain, shift, query, *slots, positions, cos, sin,
        how.partial, how.ticket,
        *((None, None) if listed is None else (listed.rows, listed.count)),
        *fetched(ahead, x.device),
        rows, query_width, kv_width, width, how.step, x.stride(0), eps,
        LISTED=listed is not None, HEAD_DIM=head_dim, NORM=norm_kind(norm_before),
        ROTARY=turn is not None, HAS_BIAS=bias is not None,
        **how.constants, **how.options, **overlapped(x.device),
    )  # fmt: skip
    return query


def place(query: Tensor, key: Tensor, value: Tensor, slots: Slots, turn: Turn | None) -> Tensor:
    """Store keys and values [rows, heads, head_dim]; the queries, turned."""
    if turn is None:
        write_kv(key, value, *slots)
        return query
    cos, sin, positions = turn
    return rotate_and_write_kv(query, key, value, cos, sin, positions, *slots)
