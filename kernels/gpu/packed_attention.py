"""Attention among packed sequences, nothing hidden: encoders, cross-attention, one-pass decoders.

Blocks of queries as in prefill, over keys that lie in one piece. Knows nothing of caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.attention import AttentionConfig, biased, long_config
from multiexit_engine.kernels.attention_tiles import attend, sequence_of_block
from multiexit_engine.kernels.launch import options
from multiexit_engine.kernels.row_lists import RowList

# int32 numbers of 16 bytes
_ALIGNED = 4
# the keys of a sequence are one page of this many
ONE_PAGE = 1 << 30


def packed_config(head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Tiles of prefill; for wide heads fewer keys at once and more registers, else ptxas spills."""
    config = long_config(1, head_dim, dtype)
    if dtype == torch.float32 or head_dim <= 64:
        return config
    return config._replace(block_n=32, max_registers=192)


class PackedStarts(NamedTuple):
    """Where the sequences of packed tensors begin, and in the end all of them end.

    Attributes:
        queries: [sequences + 1] int32.
        keys: [sequences + 1] int32.
    """

    queries: Tensor
    keys: Tensor

    @classmethod
    def of(
        cls, query_lens: Sequence[int], key_lens: Sequence[int], device: torch.device
    ) -> PackedStarts:
        """From the rows of each sequence, in one copy.

        Both begin at multiples of 16 bytes, however many sequences there are: otherwise Triton
        would compile a kernel for some numbers of them, and another for the others.
        """
        count = len(query_lens) + 1
        padding = [0] * (-count % _ALIGNED)
        rows = [[0, *accumulate(lens), *padding] for lens in (query_lens, key_lens)]
        starts = torch.tensor(rows, dtype=torch.int32)
        if device.type == "cuda":
            # memory that is not pinned may be copied only when the device has done all before
            starts = starts.pin_memory()
        queries, keys = starts.to(device, non_blocking=True)
        return cls(queries[:count], keys[:count])


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    scale: float,
) -> Tensor:
    """See ``multiexit_engine.ops.packed_attention``. One launch."""
    return attend_packed(
        query, key, value, PackedStarts.of(query_lens, key_lens, query.device), scale
    )


def biased_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, lens: Sequence[int], scale: float, bias: Tensor
) -> Tensor:
    """See ``multiexit_engine.ops.biased_attention``. One launch."""
    return attend_packed(
        query, key, value, PackedStarts.of(lens, lens, query.device), scale, bias=bias
    )


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: PackedStarts,
    scale: float,
    listed: RowList | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same where the device knows already how the sequences lie.

    Queries, keys and values may be columns of wider rows: they are read where they lie. Of
    listed queries ``starts`` counts the places; the result has nothing in the other rows. With a
    bias [heads, distances] queries and keys of a sequence are the same tokens, and none is listed.
    """
    rows, heads, head_dim = query.shape
    if query.stride(2) != 1 or query.stride(1) != head_dim:
        query = query.contiguous()
    if not _are_columns(key, value):
        key, value = key.contiguous(), value.contiguous()
    output = torch.empty(rows, heads, head_dim, dtype=query.dtype, device=query.device)
    if not rows:
        return output
    config = packed_config(head_dim, query.dtype)
    config = config if bias is None else biased(config, query.dtype)
    table = torch.zeros(1, dtype=torch.int32, device=query.device)
    num_seqs = len(starts.queries) - 1
    packed_kernel[(heads, rows // config.block_m + num_seqs)](
        query, key, value, table, starts.queries, starts.keys,
        None if bias is None else bias.contiguous(), output,
        None if listed is None else listed.rows, scale, num_seqs, query.stride(0),
        LISTED=listed is not None, HEADS=heads, KEY_HEADS=key.stride(0) // head_dim,
        HEAD_DIM=head_dim, ONE_PAGE=ONE_PAGE, BIAS_SIZE=0 if bias is None else bias.shape[1],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        STAGES=config.num_stages, **options(config.num_warps, config.max_registers),
    )  # fmt: skip
    return output


def _are_columns(key: Tensor, value: Tensor) -> bool:
    """Whether both are heads one behind the other, in rows of the same whole number of heads."""
    head_dim = key.shape[2]
    return key.stride() == value.stride() and (
        key.stride(2) == 1 and key.stride(1) == head_dim and key.stride(0) % head_dim == 0
    )


@triton.jit(do_not_specialize=["num_seqs"])
def packed_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    query_start_ptr,
    key_start_ptr,
    bias_ptr,
    output_ptr,
    row_ptr,
    scale,
    num_seqs,
    query_stride,
    LISTED: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BIAS_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of queries of one sequence and head over all keys of the sequence.

    KEY_HEADS: how many heads a row of keys and a row of values are wide in memory. LISTED: the
    queries are rows of a list, whose places ``query_start`` counts; outputs lie where they do.
    """
    head = tl.program_id(0)
    number = tl.program_id(1)
    seq = sequence_of_block(number, query_start_ptr, num_seqs, BLOCK_M)
    first = tl.load(query_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - first
    offset = (number - (first // BLOCK_M + seq)) * BLOCK_M
    if offset >= num_queries:
        return
    first_key = tl.load(key_start_ptr + seq)
    num_keys = tl.load(key_start_ptr + seq + 1) - first_key

    index = offset + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    row_mask = index < num_queries
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    row = first.to(tl.int64) + index
    if LISTED:
        row = tl.load(row_ptr + row, mask=row_mask, other=0).to(tl.int64)
    query = tl.load(  # [BLOCK_M, BLOCK_D]
        query_ptr + (row * query_stride + head * HEAD_DIM)[:, None] + dims[None, :],
        mask=mask,
        other=0.0,
    )
    sees_all = num_keys + tl.zeros((BLOCK_M,), tl.int32)
    place = first_key.to(tl.int64) * KEY_HEADS * HEAD_DIM
    bias_row = index
    if BIAS_SIZE > 0:
        bias_row = bias_ptr + head * BIAS_SIZE + tl.zeros((BLOCK_M,), tl.int32)
    output, _, total = attend(
        query, sees_all, row_mask, key_ptr + place, value_ptr + place, table_ptr, head,
        0, num_keys, scale,
        bias_row, index, BIAS_SIZE, BIAS_SIZE // 2,
        0, KEY_HEADS, HEAD_DIM, ONE_PAGE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output_ptr + ((row * HEADS + head) * HEAD_DIM)[:, None] + dims[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=mask,
    )
