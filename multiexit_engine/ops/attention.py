"""Attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from multiexit_engine.batch import SequenceLayout
from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import register_op
from multiexit_engine.transfer import to_device

# decode rows share a gather when their key counts round up to the same power of two, but below
# this many keys padding costs less than another call
_SMALLEST_BUCKET = 64


@register_op
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: SequenceLayout,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over its own cached keys.

    The last ``query_len`` keys of a sequence belong to its new tokens and stand in the cache
    already. Only slots that a sequence owns are read. Scores and softmax are at least float32.

    Args:
        query: [tokens, heads, head_dim], flat over the sequences of ``layout``.
        key_cache: [blocks, block_size, kv_heads, head_dim]; query head h reads the key-value head
            ``h // (heads // kv_heads)``.
        value_cache: of the same shape.
        layout: where each sequence lies in ``query`` and in the cache.
        scale: factor of the scores before softmax.
        window: a query sees only the last ``window`` keys, its own included; None for all.

    Returns:
        [tokens, heads, head_dim] in the dtype of ``query``.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; paged as in Kwon et al. 2023,
        arXiv:2309.06180; window as transformers' GPT-Neo and Mistral.
    """
    num_heads, head_dim = query.shape[1:]
    block_size, num_kv_heads = key_cache.shape[1:3]
    keys = key_cache.reshape(-1, num_kv_heads, head_dim)
    values = value_cache.reshape(-1, num_kv_heads, head_dim)
    output = torch.empty_like(query)
    for part in _parts(layout, block_size, window):
        num_seqs, width = part.num_seqs, part.slots.shape[0] // part.num_seqs
        q = query[part.rows].view(num_seqs, -1, num_heads, head_dim).transpose(1, 2)
        k = keys.index_select(0, part.slots).view(num_seqs, width, num_kv_heads, head_dim)
        v = values.index_select(0, part.slots).view(num_seqs, width, num_kv_heads, head_dim)
        shape = q.shape
        if shape[2] == 1:
            # a key-value head's query heads as rows of one product, without repeating keys
            q = q.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
        result = scaled_dot_product_attention(
            q,
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=part.mask,
            is_causal=part.is_causal,
            scale=scale,
            enable_gqa=q.shape[1] != num_kv_heads,
        )
        output[part.rows] = result.reshape(shape).transpose(1, 2).reshape(-1, num_heads, head_dim)
    return output


@dataclass(frozen=True)
class _Part:
    """Sequences of a batch that are computed in one call.

    Attributes:
        rows: their flat rows, a slice or an index.
        num_seqs: how many they are; all have the same number of rows and of gathered keys.
        slots: [seqs * keys] int64.
        mask: [seqs, 1, rows, keys] bool or broadcastable to it; None where nothing is hidden.
        is_causal: rows and keys are the same tokens and a plain causal mask hides the rest.
    """

    rows: slice | Tensor
    num_seqs: int
    slots: Tensor
    mask: Tensor | None
    is_causal: bool


def _parts(layout: SequenceLayout, block_size: int, window: int | None) -> list[_Part]:
    key = ("paged_attention", block_size, window)
    if key not in layout.scratch:
        lens = list(zip(layout.query_lens, layout.context_lens, strict=True))
        seen = [min(context, window or context) for _, context in lens]
        buckets: dict[int, list[int]] = {}
        for seq, (query_len, _) in enumerate(lens):
            if query_len == 1:
                bucket = max(seen[seq], _SMALLEST_BUCKET) - 1
                buckets.setdefault(bucket.bit_length(), []).append(seq)
        layout.scratch[key] = [
            *(_decode_part(layout, seqs, seen, block_size, window) for seqs in buckets.values()),
            *(
                _prefill_part(layout, seq, block_size, window)
                for seq, (query_len, _) in enumerate(lens)
                if query_len > 1
            ),
        ]
    parts: list[_Part] = layout.scratch[key]
    return parts


def _decode_part(
    layout: SequenceLayout, seqs: list[int], seen: list[int], block_size: int, window: int | None
) -> _Part:
    device = layout.block_tables.device
    everyone = len(seqs) == len(layout.query_lens)
    own = slice(None) if everyone else to_device(seqs, device)
    # lengths come from the device, so that a captured call serves other ones, too
    contexts = layout.context_lens_device[own].long()[:, None]
    num_keys = contexts if window is None else contexts.clamp(max=window)
    offsets = torch.arange(max(seen[seq] for seq in seqs), device=device)
    # past a sequence's end its own last key is read again and masked
    positions = torch.minimum(contexts - num_keys + offsets, contexts - 1)
    tables = layout.block_tables[own]
    slots = tables.gather(1, positions // block_size) * block_size + positions % block_size
    equal = len({seen[seq] for seq in seqs}) == 1 and not layout.has_bounds
    rows = [layout.query_starts[seq] for seq in seqs]
    return _Part(
        rows=slice(None) if everyone else to_device(rows, device),
        num_seqs=len(seqs),
        slots=slots.flatten(),
        mask=None if equal else (offsets < num_keys)[:, None, None],
        is_causal=False,
    )


def _prefill_part(layout: SequenceLayout, seq: int, block_size: int, window: int | None) -> _Part:
    device = layout.block_tables.device
    query_len, context = layout.query_lens[seq], layout.context_lens[seq]
    first = 0 if window is None else max(0, context - query_len - window + 1)
    positions = torch.arange(first, context, device=device)
    slots = layout.block_tables[seq][positions // block_size] * block_size + positions % block_size
    is_causal = query_len == context and (window is None or window >= context)
    mask = None
    if not is_causal:
        distance = positions[-query_len:, None] - positions
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    start = layout.query_starts[seq]
    return _Part(slice(start, start + query_len), 1, slots, mask, is_causal)


def kernel_reads(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> bool:
    """Whether the GPU's kernels take queries and cache: one type, heads of up to 256."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    same = query.dtype == key_cache.dtype == value_cache.dtype
    return same and query.dtype in kinds and query.shape[2] <= 256


paged_attention.backend(
    "triton",
    "multiexit_engine.kernels.attention:paged_attention",
    device="cuda",
    supports=kernel_reads,
)
paged_attention.backend(
    "cpu",
    "multiexit_engine._native:paged_attention",
    device="cpu",
    supports=lambda query, key_cache, value_cache, *_: (
        is_plain(query, key_cache) and is_streamable(key_cache, value_cache)
    ),
)
