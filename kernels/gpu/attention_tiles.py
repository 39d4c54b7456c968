"""The kernels of ``attention``: a block of queries over paged keys, whole or in parts.

A query block holds some queries of one sequence times all query heads of one key-value head, so
that a key is read once for all of them. Knows nothing of batches: that is ``attention``'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multiexit_engine.kernels.overlap import arrive

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    query,
    positions,
    row_mask,
    key_ptr,
    value_ptr,
    table_ptr,
    kv_head,
    begin,
    end,
    scale,
    bias_row,
    places,
    BIAS_SIZE: tl.constexpr,
    BIAS_AFTER: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax over keys [begin, end): sums of values, largest scores (base 2), sums of p.

    A row that sees none of the keys has zeros and a largest score of -inf. With BIAS_SIZE biases at
    ``bias_row`` [BLOCK_M] scores gain the one of their distance, ``places`` [BLOCK_M] less key,
    which begin with that of -BIAS_AFTER; farther distances have the first and the last one.
    """
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_N)
        key_mask = (keys >= begin) & (keys < end)
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=key_mask, other=0)  # [BLOCK_N]
        slot = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        place = (slot * KV_HEADS + kv_head) * HEAD_DIM
        mask = key_mask[:, None] & dim_mask[None, :]
        key = tl.load(  # [BLOCK_N, BLOCK_D]
            key_ptr + place[:, None] + dims[None, :], mask=mask, other=0.0
        )
        value = tl.load(  # [BLOCK_N, BLOCK_D]
            value_ptr + place[:, None] + dims[None, :], mask=mask, other=0.0
        )
        if query.dtype == tl.float32:
            scores = tl.dot(query, key.T, input_precision="ieee")
        else:
            scores = tl.dot(query, key.T)
        visible = key_mask[None, :] & row_mask[:, None] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (positions[:, None] - keys[None, :] < WINDOW)
        scores = scores * (scale * _LOG2_E)
        if BIAS_SIZE > 0:
            distance = tl.maximum(places[:, None] - keys[None, :] + BIAS_AFTER, 0)
            distance = tl.minimum(distance, BIAS_SIZE - 1)
            gain = tl.load(bias_row[:, None] + distance, mask=visible, other=0.0)
            scores += gain.to(tl.float32) * _LOG2_E  # [BLOCK_M, BLOCK_N]
        scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # Without this a row that has seen nothing yet would compute -inf - -inf.
        finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(largest - finite)
        total = total * decay + tl.sum(p, 1)
        output = output * decay[:, None]
        if query.dtype == tl.float32:
            output = tl.dot(p, value, output, input_precision="ieee")
        else:
            output = tl.dot(p.to(value.dtype), value, output)
        largest = new_largest
    return output, largest, total


@triton.jit
def _chunk_length(context, BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr, MAX_PARTS: tl.constexpr):
    """Keys of one part: a function of the sequence alone, so its sums do not know its mates."""
    share = tl.cdiv(context, MAX_PARTS)
    return tl.maximum(MIN_CHUNK, tl.cdiv(share, BLOCK_N) * BLOCK_N)


@triton.jit(do_not_specialize=["table_stride", "max_queries", "ahead_bytes"])
def short_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    start_ptr,
    context_ptr,
    bias_ptr,
    partial_ptr,
    weight_ptr,
    row_ptr,
    count_ptr,
    table_row_ptr,
    ahead_ptr,
    ahead_bytes,
    scale,
    query_stride,
    table_stride,
    max_queries,
    LISTED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ALONE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One part of the keys of a sequence whose queries fit one block; writes unscaled sums.

    ``partial`` [seqs, max_queries, heads, parts, head_dim], ``weight`` [..., parts, 2] hold the
    sums of values, the largest score and the sum of p. Parts outside a window are not written.
    ALONE: there is one part, and ``partial`` is the result [tokens, heads, head_dim].
    LISTED: the sequences are those of a list, and ``table_row`` says which block table each has.
    """
    arrive(ahead_ptr, ahead_bytes, OVERLAP)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    part = tl.program_id(0)
    num_parts = tl.num_programs(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    table = seq
    if LISTED:
        if seq >= tl.load(count_ptr):
            return
        seq = tl.load(row_ptr + seq).to(tl.int64)
        table = tl.load(table_row_ptr + seq)
    first = tl.load(start_ptr + seq)
    num_queries = tl.load(start_ptr + seq + 1) - first
    context = tl.load(context_ptr + seq)
    if num_queries > BLOCK_M // GROUP:
        return
    chunk = _chunk_length(context, BLOCK_N, MIN_CHUNK, MAX_PARTS)
    begin = part * chunk
    if WINDOW > 0:
        begin = tl.maximum(begin, context - num_queries - WINDOW + 1)
    end = tl.minimum((part + 1) * chunk, context)
    if begin >= end:
        return

    lanes = tl.arange(0, BLOCK_M)
    index = lanes // GROUP
    head = kv_head * GROUP + lanes % GROUP
    dims = tl.arange(0, BLOCK_D)
    row_mask = (index < num_queries) & (lanes < BLOCK_M // GROUP * GROUP)
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    token = first.to(tl.int64) + index
    query = tl.load(  # [BLOCK_M, BLOCK_D]
        query_ptr + (token * query_stride + head * HEAD_DIM)[:, None] + dims[None, :],
        mask=mask,
        other=0.0,
    )
    bias_row = head
    if BIAS_SIZE > 0:
        bias_row = bias_ptr + head * BIAS_SIZE
    positions = context - num_queries + index
    output, largest, total = attend(
        query, positions, row_mask, key_ptr, value_ptr,
        table_ptr + table * table_stride, kv_head, begin, end, scale,
        bias_row, positions, BIAS_SIZE, 0,
        WINDOW, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip
    if ALONE:
        output = (output / total[:, None]).to(partial_ptr.dtype.element_ty)
        place = (token * HEADS + head) * HEAD_DIM
        tl.store(partial_ptr + place[:, None] + dims[None, :], output, mask=mask)
    else:
        row = ((seq * max_queries + index) * HEADS + head) * num_parts + part
        tl.store(partial_ptr + row[:, None] * HEAD_DIM + dims[None, :], output, mask=mask)
        tl.store(weight_ptr + row * 2, largest, mask=row_mask)
        tl.store(weight_ptr + row * 2 + 1, total, mask=row_mask)


@triton.jit(do_not_specialize=["num_parts"])
def merge_kernel(
    partial_ptr,
    weight_ptr,
    output_ptr,
    start_ptr,
    context_ptr,
    row_ptr,
    count_ptr,
    num_parts,
    LISTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Join the parts of one query and head, in order. LISTED: of the sequences of a list."""
    arrive(None, 0, OVERLAP)
    head = tl.program_id(0)
    index = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    if LISTED:
        if seq >= tl.load(count_ptr):
            return
        seq = tl.load(row_ptr + seq).to(tl.int64)
    first = tl.load(start_ptr + seq)
    num_queries = tl.load(start_ptr + seq + 1) - first
    context = tl.load(context_ptr + seq)
    if (index >= num_queries) | (num_queries > MOST_QUERIES):
        return
    chunk = _chunk_length(context, BLOCK_N, MIN_CHUNK, MAX_PARTS)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, context - num_queries - WINDOW + 1)
    parts = tl.arange(0, PARTS)
    part_mask = (parts >= begin // chunk) & (parts < tl.cdiv(context, chunk))
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    heads = tl.num_programs(0)
    row = (seq * tl.num_programs(1) + index) * heads + head
    place = row * num_parts + parts
    largest = tl.load(weight_ptr + place * 2, mask=part_mask, other=float("-inf"))  # [PARTS]
    total = tl.load(weight_ptr + place * 2 + 1, mask=part_mask, other=0.0)  # [PARTS]
    share = tl.exp2(largest - tl.max(largest, 0))
    sums = tl.load(  # [PARTS, BLOCK_D]
        partial_ptr + place[:, None] * HEAD_DIM + dims[None, :],
        mask=part_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    output = tl.sum(sums * share[:, None], 0) / tl.sum(total * share, 0)
    target = (first.to(tl.int64) + index) * heads + head
    tl.store(
        output_ptr + target * HEAD_DIM + dims,
        output.to(output_ptr.dtype.element_ty),
        mask=dim_mask,
    )


@triton.jit
def sequence_of_block(number, start_ptr, num_seqs, QUERIES: tl.constexpr):
    """The sequence of a block of queries, by binary search.

    Blocks are numbered so that sequence s starts at ``start[s] // queries + s``, as in vLLM.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) // QUERIES + middle <= number:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def long_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    start_ptr,
    context_ptr,
    bias_ptr,
    output_ptr,
    scale,
    num_seqs,
    query_stride,
    table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS_SIZE: tl.constexpr,
    MOST_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of queries of a prefill chunk over all keys that it sees."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    number = tl.program_id(1)
    kv_head = tl.program_id(0)
    seq = sequence_of_block(number, start_ptr, num_seqs, QUERIES)
    first = tl.load(start_ptr + seq)
    num_queries = tl.load(start_ptr + seq + 1) - first
    offset = (number - (first // QUERIES + seq)) * QUERIES
    if (offset >= num_queries) | (num_queries <= MOST_QUERIES):
        return
    context = tl.load(context_ptr + seq)

    lanes = tl.arange(0, BLOCK_M)
    index = offset + lanes // GROUP
    head = kv_head * GROUP + lanes % GROUP
    dims = tl.arange(0, BLOCK_D)
    row_mask = (index < num_queries) & (lanes < QUERIES * GROUP)
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    token = first.to(tl.int64) + index
    query = tl.load(  # [BLOCK_M, BLOCK_D]
        query_ptr + (token * query_stride + head * HEAD_DIM)[:, None] + dims[None, :],
        mask=mask,
        other=0.0,
    )
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, context - num_queries + offset - WINDOW + 1)
    end = tl.minimum(context, context - num_queries + offset + QUERIES)
    bias_row = head
    if BIAS_SIZE > 0:
        bias_row = bias_ptr + head * BIAS_SIZE
    positions = context - num_queries + index
    output, _, total = attend(
        query, positions, row_mask, key_ptr, value_ptr,
        table_ptr + seq * table_stride, kv_head, begin, end, scale,
        bias_row, positions, BIAS_SIZE, 0,
        WINDOW, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output_ptr + ((token * HEADS + head) * HEAD_DIM)[:, None] + dims[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=mask,
    )
