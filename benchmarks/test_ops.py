"""Single ops under pytest-benchmark, at GPT-2-medium's size, float32, one decode step.

Run with ``pytest benchmarks/test_ops.py --benchmark-columns=median,ops``.
"""

from __future__ import annotations

import pytest
import torch

from multiexit_engine.batch import SequenceLayout
from multiexit_engine.ops import (
    contrast_heads,
    head_logits,
    linear,
    paged_attention,
    sample_tokens,
)

VOCAB, HIDDEN, HEADS, HEAD_DIM = 50257, 1024, 16, 64
BLOCK = 16
ROWS = pytest.mark.parametrize("rows", [1, 16])


@pytest.fixture(scope="module")
def head():
    return torch.randn(VOCAB, HIDDEN) * 2.8 * HIDDEN**-0.5


@ROWS
def test_one_head(benchmark, head, rows):
    benchmark(head_logits, torch.randn(rows, HIDDEN), head, None)


@ROWS
def test_contrast_of_two_heads(benchmark, head, rows):
    lower = torch.randn_like(head) * 2.8 * HIDDEN**-0.5
    alpha = torch.full((rows,), 0.1)
    benchmark(
        contrast_heads, torch.randn(rows, HIDDEN), head, torch.randn(rows, HIDDEN), lower, alpha
    )


@ROWS
def test_sampling_from_the_whole_vocabulary(benchmark, rows):
    places = torch.arange(rows)
    benchmark(sample_tokens, torch.randn(rows, VOCAB), places, places)


@ROWS
def test_mlp_matrix(benchmark, rows):
    weight, bias = torch.randn(4 * HIDDEN, HIDDEN), torch.randn(4 * HIDDEN)
    benchmark(linear, torch.randn(rows, HIDDEN), weight, bias)


@ROWS
def test_attention_over_512_keys(benchmark, rows):
    blocks = 512 // BLOCK
    cache = torch.randn(2, rows * blocks, BLOCK, HEADS, HEAD_DIM)
    layout = SequenceLayout(
        query_lens=(1,) * rows,
        context_lens=(512,) * rows,
        cu_query_lens=torch.arange(rows + 1, dtype=torch.int32),
        context_lens_device=torch.full((rows,), 512, dtype=torch.int32),
        block_tables=torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks),
    )
    query = torch.randn(rows, HEADS, HEAD_DIM)
    benchmark(paged_attention, query, cache[0], cache[1], layout, HEAD_DIM**-0.5, None)
