"""Paged attention of decode rows, against bandwidth and against PyTorch's attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.cases import Card, Case
from benchmarks.gpu.timing import DEVICE, copies_of, graph_us, sized
from multiexit_engine.batch import SequenceLayout
from multiexit_engine.kernels.attention import paged_attention

# model, query heads, key-value heads, width of a head, window
MODELS = (
    ("gpt2-medium", 16, 16, 64, None),
    ("gpt-neo-125m", 12, 12, 64, 256),
    ("llama-8b", 32, 8, 128, None),
)
SIZES = sized(((1, 1024), (1, 8192), (1, 32768), (16, 1024), (16, 8192), (64, 2048)), ((2, 64),))
BLOCK_SIZE = 16


def layout_of(batch: int, context: int) -> SequenceLayout:
    """Decode rows of equal contexts whose blocks lie scattered over the cache."""
    blocks = context // BLOCK_SIZE
    tables = torch.randperm(batch * blocks, device=DEVICE).int().view(batch, blocks)
    return SequenceLayout(
        query_lens=(1,) * batch,
        context_lens=(context,) * batch,
        cu_query_lens=torch.arange(batch + 1, dtype=torch.int32, device=DEVICE),
        context_lens_device=torch.full((batch,), context, dtype=torch.int32, device=DEVICE),
        block_tables=tables,
    )


def cases(card: Card) -> Iterator[Case]:
    """One line for each model, batch and context."""
    for name, heads, kv_heads, head_dim, window in MODELS:
        for batch, context in SIZES:
            shape = (batch, context, heads, kv_heads, head_dim)
            label = {"model": name, "batch": batch, "context": context}
            yield Case(label, partial(_line, shape, window, card.read_tb_s))
            torch.cuda.empty_cache()


def _line(
    shape: tuple[int, int, int, int, int], window: int | None, read_tb_s: float
) -> dict[str, Any]:
    batch, context, heads, kv_heads, head_dim = shape
    layout = layout_of(batch, context)
    query = torch.randn(batch, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    seen = min(context, window or context)
    num_bytes = 2 * 2 * batch * seen * kv_heads * head_dim
    copies = min(copies_of(num_bytes), 24)
    blocks = batch * context // BLOCK_SIZE
    size = (copies, 2, blocks, BLOCK_SIZE, kv_heads, head_dim)
    caches = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
    scale = head_dim**-0.5
    ours = graph_us(
        [lambda c=c: paged_attention(query, c[0], c[1], layout, scale, window) for c in caches]
    )
    # PyTorch is given its keys contiguous, as a cache without pages would hold them.
    plain = caches.view(copies, 2, batch, context, kv_heads, head_dim).transpose(3, 4)
    plain = plain[..., context - seen :, :].contiguous()
    sdpa = graph_us([lambda c=c: _sdpa(query, c, scale) for c in plain])
    return {
        "MB": num_bytes / 1e6,
        "us": ours,
        "%": num_bytes / ours / read_tb_s / 1e4,
        "sdpa_us": sdpa,
    }


def _sdpa(query: Tensor, cache: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(
        query[:, :, None], cache[0], cache[1], scale=scale, enable_gqa=True
    )
