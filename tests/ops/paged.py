"""A flat batch over a scrambled paged cache in which all that nobody owns is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multiexit_engine.batch import SequenceLayout


@dataclass(frozen=True)
class PagedBatch:
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    layout: SequenceLayout
    keys: list[Tensor]
    values: list[Tensor]


def paged_batch(
    query_lens: list[int],
    context_lens: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> PagedBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_blocks = [-(-length // block_size) for length in context_lens]
    order = torch.randperm(sum(num_blocks) + 3, generator=generator)
    caches = [
        torch.full((len(order), block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
        for _ in range(2)
    ]
    tables = torch.full((len(context_lens), max(num_blocks) + 1), -1, dtype=torch.int32)
    owned: tuple[list[Tensor], list[Tensor]] = ([], [])
    for seq, (length, count) in enumerate(zip(context_lens, num_blocks, strict=True)):
        blocks, order = order[:count], order[count:]
        tables[seq, :count] = blocks
        places = torch.arange(length)
        for cache, kept in zip(caches, owned, strict=True):
            kept.append(normal(length, num_kv_heads, head_dim))
            cache[blocks[places // block_size], places % block_size] = kept[-1]
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    layout = SequenceLayout(
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        cu_query_lens=starts.to(device),
        context_lens_device=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
    )
    query = normal(sum(query_lens), num_heads, head_dim)
    return PagedBatch(query.to(device), caches[0].to(device), caches[1].to(device), layout, *owned)


def attention_truth(batch: PagedBatch, scale: float, window: int | None) -> Tensor:
    """[tokens, heads, head_dim] float64, one query and one head after the other."""
    rows = []
    lens = zip(batch.layout.query_lens, batch.layout.context_lens, strict=True)
    for seq, (query_len, context) in enumerate(lens):
        keys, values = batch.keys[seq].double(), batch.values[seq].double()
        start = batch.layout.query_starts[seq]
        for place in range(query_len):
            query = batch.query[start + place].double().cpu()
            stop = context - query_len + place + 1
            first = 0 if window is None else max(0, stop - window)
            group = query.shape[0] // keys.shape[1]
            heads = []
            for head in range(query.shape[0]):
                scores = keys[first:stop, head // group] @ query[head] * scale
                heads.append(scores.softmax(0) @ values[first:stop, head // group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def biased_attention_truth(batch: PagedBatch, scale: float, bias: Tensor) -> Tensor:
    """[tokens, heads, head_dim] float64, one query after the other; ``bias`` [heads, reach]."""
    rows = []
    lens = zip(batch.layout.query_lens, batch.layout.context_lens, strict=True)
    for seq, (query_len, context) in enumerate(lens):
        keys, values = batch.keys[seq].double(), batch.values[seq].double()
        start = batch.layout.query_starts[seq]
        for place in range(query_len):
            stop = context - query_len + place + 1
            query = batch.query[start + place].double().cpu()
            scores = torch.einsum("khd,hd->hk", keys[:stop], query)
            distance = torch.arange(stop - 1, -1, -1).clamp(max=bias.shape[1] - 1)
            weights = (scores * scale + bias[:, distance].double()).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, values[:stop]))
    return torch.stack(rows)
