"""Attention over the paged KV cache: parts of long contexts side by side, prefill in blocks.

A sequence with few new tokens (decode, drafts to verify) is cut along its keys, in parts that
depend on its own length only, so that neither its speed nor its rounding depends on its batch
mates; one with many is cut along its queries. Knows nothing of who owns a cache block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from multiexit_engine.kernels.attention_tiles import long_kernel, merge_kernel, short_kernel
from multiexit_engine.kernels.launch import options
from multiexit_engine.kernels.overlap import fetched, overlapped
from multiexit_engine.kernels.row_lists import RowList

# Keys of a part, and most parts of a sequence; beyond 16k keys the parts grow.
MIN_CHUNK = 256
MAX_PARTS = 64


class ListedSequences(NamedTuple):
    """Sequences of one query each that are attended, and the row of each in the block tables."""

    listed: RowList
    tables: Tensor


class AttentionConfig(NamedTuple):
    """How queries and keys are cut into tiles.

    Attributes:
        block_m: rows of a query block: queries times query heads of one key-value head.
        block_n: keys of one step.
        num_stages: loads in flight.
        num_warps: of a program.
        max_registers: of a thread; None leaves them to the compiler.
    """

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int
    max_registers: int | None = None


def short_config(group: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Tiles of decode rows, for ``group`` query heads of each key-value head."""
    rows = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        if head_dim <= 64:
            return AttentionConfig(rows, 16, 2, 4, 168)
        return AttentionConfig(rows, 16, 2, 8, 128 if head_dim <= 128 else 255)
    return AttentionConfig(rows, 64 if head_dim <= 128 else 32, 3, 4)


def long_config(group: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Tiles of prefill blocks, for ``group`` query heads of each key-value head."""
    if dtype == torch.float32:
        return short_config(group, head_dim, dtype)
    rows = max(64, triton.next_power_of_2(group))
    if head_dim <= 64:
        return AttentionConfig(rows, 64, 3, 4)
    return AttentionConfig(rows, 64 if head_dim <= 128 else 32, 2, 8)


def biased(config: AttentionConfig, dtype: torch.dtype) -> AttentionConfig:
    """The same for scores with biases, whose tile wants registers too: fewer keys at once.

    With 64 keys ptxas spills on sm_120.
    """
    return config if dtype == torch.float32 else config._replace(block_n=32)


def merge_options(head_dim: int) -> dict[str, int]:
    """Launch options that hold the parts of a head in registers."""
    return options(4 if head_dim <= 128 else 8, 128)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: Any,
    scale: float,
    window: int | None,
) -> Tensor:
    """See ``multiexit_engine.ops.attention``. Two launches for decode rows, one for prefill."""
    return attend_paged(query, key_cache, value_cache, layout, scale, window, None)


def biased_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: Any,
    scale: float,
    bias: Tensor,
) -> Tensor:
    """See ``multiexit_engine.ops.biased_attention``; as many launches."""
    return attend_paged(query, key_cache, value_cache, layout, scale, None, bias)


def attend_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: Any,
    scale: float,
    window: int | None,
    bias: Tensor | None,
    ahead: Any = None,
    only: ListedSequences | None = None,
) -> Tensor:
    """Both of the above: ``bias`` [heads, distances], or None; ``ahead`` as in ``product``.

    Of listed sequences ``only``, where given.
    """
    tokens, heads, head_dim = query.shape
    if query.stride(2) != 1 or query.stride(1) != head_dim:
        query = query.contiguous()
    output = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    group = heads // key_cache.shape[2]
    config = short_config(group, head_dim, query.dtype)
    most = config.block_m // group
    shorts = [
        (queries, context)
        for queries, context in zip(layout.query_lens, layout.context_lens, strict=True)
        if queries <= most
    ]
    shape = {
        "HEAD_DIM": head_dim,
        "WINDOW": window or 0,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }
    cache = {
        "HEADS": heads,
        "KV_HEADS": key_cache.shape[2],
        "BLOCK_SIZE": key_cache.shape[1],
        "BIAS_SIZE": 0 if bias is None else bias.shape[1],
    }
    bias = None if bias is None else bias.contiguous()
    if shorts:
        max_queries = max(queries for queries, _ in shorts)
        max_context = max(context for _, context in shorts)
        _short(query, key_cache, value_cache, layout, scale, bias, output, config, shape, cache,
               max_queries, max_context, ahead, only)  # fmt: skip
    if len(shorts) < len(layout.query_lens):
        config = long_config(group, head_dim, query.dtype)
        config = config if bias is None else biased(config, query.dtype)
        num_seqs = len(layout.query_lens)
        blocks = tokens // (config.block_m // group) + num_seqs
        long_kernel[(key_cache.shape[2], blocks)](
            query, key_cache, value_cache, layout.block_tables,
            layout.cu_query_lens, layout.context_lens_device, bias, output, scale, num_seqs,
            query.stride(0), layout.block_tables.stride(0),
            **shape, **cache, MOST_QUERIES=most, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            STAGES=config.num_stages, **options(config.num_warps, config.max_registers),
        )  # fmt: skip
    return output


def _short(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: Any,
    scale: float,
    bias: Tensor | None,
    output: Tensor,
    config: AttentionConfig,
    shape: dict[str, int],
    cache: dict[str, int],
    max_queries: int,
    max_context: int,
    ahead: Any,
    only: ListedSequences | None,
) -> None:
    """Sequences of few queries: all parts of all of them, then their merge unless there is one."""
    num_seqs, heads, head_dim = len(layout.query_lens), query.shape[1], query.shape[2]
    parts = min(MAX_PARTS, triton.cdiv(max_context, MIN_CHUNK))
    rows = num_seqs * max_queries * heads * parts
    partial, weight = output, None
    if parts > 1:
        partial = torch.empty(rows, head_dim, dtype=torch.float32, device=query.device)
        weight = torch.empty(rows, 2, dtype=torch.float32, device=query.device)
    which = (None, None) if only is None else (only.listed.rows, only.listed.count)
    cut = {"BLOCK_N": config.block_n, "MIN_CHUNK": MIN_CHUNK, "MAX_PARTS": MAX_PARTS}
    short_kernel[(parts, key_cache.shape[2], num_seqs)](
        query, key_cache, value_cache, layout.block_tables,
        layout.cu_query_lens, layout.context_lens_device, bias, partial, weight, *which,
        None if only is None else only.tables, *fetched(ahead, query.device), scale,
        query.stride(0), layout.block_tables.stride(0), max_queries,
        LISTED=only is not None, **shape, **cache, **cut, BLOCK_M=config.block_m,
        STAGES=config.num_stages, ALONE=parts == 1,
        **options(config.num_warps, config.max_registers), **overlapped(query.device),
    )  # fmt: skip
    if parts == 1:
        return
    merge_kernel[(heads, max_queries, num_seqs)](
        partial, weight, output, layout.cu_query_lens, layout.context_lens_device, *which, parts,
        LISTED=only is not None, **shape, **cut, PARTS=triton.next_power_of_2(parts),
        MOST_QUERIES=config.block_m // (heads // key_cache.shape[2]),
        **merge_options(head_dim), **overlapped(query.device),
    )  # fmt: skip
