"""Attention among sequences that lie packed in flat tensors, nothing hidden and nothing cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from multiexit_engine.ops.operands import is_plain
from multiexit_engine.ops.registry import register_op


@register_op
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    scale: float,
) -> Tensor:
    """Every query of a sequence over all keys of the same sequence, before and after it.

    Self-attention of an encoder or of a decoder that sees everything when both lengths are equal;
    cross-attention when the keys are of another text. Sequences without queries are allowed.

    Args:
        query: [sum(query_lens), heads, head_dim], the sequences one behind the other.
        key: [sum(key_lens), heads, head_dim].
        value: of the shape of ``key``.
        query_lens: rows of each sequence in ``query``.
        key_lens: rows of each sequence in ``key``, at least one each.
        scale: factor of the scores before softmax.

    Returns:
        [sum(query_lens), heads, head_dim] in the dtype of ``query``.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    parts = [torch.empty_like(query[:0])]
    for q, k, v in _runs(query, key, value, query_lens, key_lens):
        mixed = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
        )
        parts.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _runs(
    query: Tensor, key: Tensor, value: Tensor, query_lens: Sequence[int], key_lens: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Neighbours of equal lengths together: [sequences, rows, heads, head_dim] each."""
    first_query = first_key = 0
    for (rows, keys), run in groupby(zip(query_lens, key_lens, strict=True)):
        count = len(list(run))
        after_query, after_key = first_query + count * rows, first_key + count * keys
        if rows:
            yield (
                query[first_query:after_query].reshape(count, rows, *query.shape[1:]),
                key[first_key:after_key].reshape(count, keys, *key.shape[1:]),
                value[first_key:after_key].reshape(count, keys, *value.shape[1:]),
            )
        first_query, first_key = after_query, after_key


packed_attention.backend(
    "triton",
    "multiexit_engine.kernels.packed_attention:packed_attention",
    device="cuda",
    supports=lambda query, *_: query.dtype in (torch.bfloat16, torch.float16, torch.float32),
)
packed_attention.backend(
    "cpu",
    "multiexit_engine._native:packed_attention",
    device="cpu",
    supports=lambda query, key, value, *_: is_plain(query, key, value),
)
