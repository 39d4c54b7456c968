"""The attention kernels as the engine launches them, for the compile test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton

from multiexit_engine.kernels import attention, attention_tiles, packed_attention
from multiexit_engine.kernels.launch import options
from tests.kernels.shipped import DTYPES, Shipped
from tests.kernels.shipped_layers import POINTERS

# heads of queries and of keys, numbers of one, window, distances that have a bias
SHAPES = (
    (16, 16, 64, 0, 0),
    (12, 12, 64, 256, 0),
    (32, 8, 128, 0, 0),
    (20, 4, 96, 0, 0),
    (8, 1, 256, 0, 0),
    (12, 12, 64, 0, 129),
    (32, 32, 128, 0, 129),
)


def attentions(overlap: bool) -> Iterator[Shipped]:
    """Attention over packed rows and over the cache."""
    for dtype in DTYPES:
        for head_dim in (64, 128):
            yield from (_packed(head_dim, dtype, is_listed) for is_listed in (True, False))
            yield _packed(head_dim, dtype, is_listed=False, reach=128)
        for shape in SHAPES:
            yield from _attention(dtype, *shape, overlap)


def _packed(head_dim: int, dtype: torch.dtype, is_listed: bool, reach: int = 0) -> Shipped:
    """Keys and values lie in rows of queries, keys and values."""
    tiles = packed_attention.packed_config(head_dim, dtype)
    tiles = attention.biased(tiles, dtype) if reach else tiles
    return Shipped(
        f"packed heads=16x{head_dim} listed={is_listed} reach={reach}",
        packed_attention.packed_kernel,
        dtype,
        {
            **({} if is_listed else {"row_ptr": None}),
            "LISTED": is_listed,
            **({} if reach else {"bias_ptr": None}),
            "BIAS_SIZE": 2 * reach + 1 if reach else 0,
            "HEADS": 16,
            "KEY_HEADS": 48,
            "HEAD_DIM": head_dim,
            "ONE_PAGE": packed_attention.ONE_PAGE,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": head_dim,
            "STAGES": tiles.num_stages,
        },
        options(tiles.num_warps, tiles.max_registers),
    )


def _attention(
    dtype: torch.dtype,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    reach: int,
    overlap: bool,
) -> Iterator[Shipped]:
    group = num_heads // kv_heads
    name = f"heads={num_heads}/{kv_heads}x{head_dim} window={window} reach={reach}"
    shape = {
        "HEAD_DIM": head_dim,
        "WINDOW": window,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    cache = {"HEADS": num_heads, "KV_HEADS": kv_heads, "BLOCK_SIZE": 16, "BIAS_SIZE": reach}
    if not reach:
        cache["bias_ptr"] = None
    short = attention.short_config(group, head_dim, dtype)
    cut = {
        "BLOCK_N": short.block_n,
        "MIN_CHUNK": attention.MIN_CHUNK,
        "MAX_PARTS": attention.MAX_PARTS,
    }
    begins = {"OVERLAP": overlap, **({} if overlap else {"ahead_ptr": None})}
    merged = {"PARTS": 64, "MOST_QUERIES": 16, "OVERLAP": overlap}
    for alone, is_listed in product((False, True), (False, True)):
        listed: dict[str, Any] = {"LISTED": is_listed}
        listed |= {} if is_listed else {"row_ptr": None, "count_ptr": None}
        yield Shipped(
            f"short {name} alone={alone} listed={is_listed}",
            attention_tiles.short_kernel,
            dtype,
            {
                **shape,
                **cache,
                **cut,
                **begins,
                **listed,
                **({} if is_listed else {"table_row_ptr": None}),
                **({"ahead_ptr": None} if is_listed else {}),
                **({"weight_ptr": None} if alone else {}),
                "BLOCK_M": short.block_m,
                "STAGES": short.num_stages,
                "ALONE": alone,
            },
            options(short.num_warps, short.max_registers),
            {"partial_ptr": POINTERS[dtype]} if alone else {},
        )
        if not alone:
            yield Shipped(
                f"merge {name} listed={is_listed}",
                attention_tiles.merge_kernel,
                dtype,
                {**shape, **cut, **merged, **listed},
                attention.merge_options(head_dim),
            )
    long = attention.long_config(group, head_dim, dtype)
    long = attention.biased(long, dtype) if reach else long
    yield Shipped(
        f"long {name}",
        attention_tiles.long_kernel,
        dtype,
        {
            **shape,
            **cache,
            "MOST_QUERIES": 16,
            "BLOCK_M": long.block_m,
            "BLOCK_N": long.block_n,
            "STAGES": long.num_stages,
        },
        options(long.num_warps, long.max_registers),
    )
