"""Queries and keys turned by their positions, keys and values stored, in one launch.

Knows nothing of who owns a cache block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.kv import token_rows
from multiexit_engine.kernels.launch import options


@triton.jit
def _turned(source, target, mask, cos, sin, HALF: tl.constexpr):
    """Rotate the heads at ``source`` [heads, half] and store them at ``target``."""
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def rotate_and_write_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    turned_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_ptr,
    query_stride,
    key_stride,
    value_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    lanes = tl.arange(0, BLOCK_D)
    inside = lanes < HALF
    angles = tl.load(position_ptr + token) * HALF + lanes
    cos = tl.load(cos_ptr + angles, mask=inside, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    heads = tl.arange(0, BLOCK_Q)[:, None]
    places = heads * HEAD_DIM + lanes[None, :]
    mask = (heads < HEADS) & inside[None, :]
    target = turned_ptr + token * HEADS * HEAD_DIM + places
    _turned(query_ptr + token * query_stride + places, target, mask, cos, sin, HALF)

    slot = tl.load(slot_ptr + token) * KV_HEADS * HEAD_DIM
    heads = tl.arange(0, BLOCK_KV)[:, None]
    places = heads * HEAD_DIM + lanes[None, :]
    mask = (heads < KV_HEADS) & inside[None, :]
    target = key_cache_ptr + slot + places
    _turned(key_ptr + token * key_stride + places, target, mask, cos, sin, HALF)
    source = value_ptr + token * value_stride + places
    target = value_cache_ptr + slot + places
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)
    tl.store(target + HALF, tl.load(source + HALF, mask=mask, other=0.0), mask=mask)


def rotate_and_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """See ``multiexit_engine.ops.kv``. One launch, one program for each token."""
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    query, key, value = (token_rows(each) for each in (query, key, value))
    turned = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    if tokens:
        rotate_and_write_kernel[(tokens,)](
            query, key, value, cos, sin, positions, turned, key_cache, value_cache, slot_mapping,
            query.stride(0), key.stride(0), value.stride(0),
            HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
            BLOCK_Q=triton.next_power_of_2(max(1, heads)),
            BLOCK_KV=triton.next_power_of_2(kv_heads),
            BLOCK_D=triton.next_power_of_2(head_dim // 2), **options(4),
        )  # fmt: skip
    return turned
