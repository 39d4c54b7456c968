"""Paged attention on every instruction set, with NaN wherever no sequence owns the cache."""

import pytest
import torch

from multiexit_engine._native import paged_attention
from multiexit_engine.batch import SequenceLayout
from tests.ops.paged import attention_truth, paged_batch

BATCHES = pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([1], [1]), ([1, 1, 1], [1, 63, 300]), ([5, 1, 9, 2], [12, 1, 9, 31]), ([63], [100])],
)


def run(batch, scale, window):
    return paged_attention(
        batch.query, batch.key_cache, batch.value_cache, batch.layout, scale, window
    )


@BATCHES
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [1, 12, 64, 80])
def test_equals_the_formula(
    isa, query_lens, context_lens, window, num_heads, num_kv_heads, head_dim
):
    batch = paged_batch(
        query_lens,
        context_lens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    truth = attention_truth(batch, 0.3, window)
    torch.testing.assert_close(run(batch, 0.3, window).double(), truth, atol=4e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_the_formula(isa, dtype):
    batch = paged_batch([5, 1, 9], [12, 1, 300], head_dim=48, dtype=dtype)
    truth = attention_truth(batch, 0.2, None)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(run(batch, 0.2, None).double(), truth, atol=eps, rtol=eps)


def test_unscaled_large_scores_do_not_overflow(isa):
    batch = paged_batch([1, 3], [9, 3], head_dim=64)
    batch.query.mul_(1e4)
    truth = attention_truth(batch, 1.0, None)
    torch.testing.assert_close(run(batch, 1.0, None).double(), truth, atol=1e-3, rtol=0)


def test_a_sequence_is_the_same_in_any_batch_and_for_any_number_of_threads(isa, threads):
    batch = paged_batch([4, 1, 7], [9, 170, 30], head_dim=24)
    torch.set_num_threads(1)
    whole = run(batch, 0.3, 100)
    torch.set_num_threads(threads)
    assert torch.equal(run(batch, 0.3, 100), whole)
    first = paged_attention(
        batch.query[:5], batch.key_cache, batch.value_cache, batch.layout.first(2), 0.3, 100
    )
    assert torch.equal(first, whole[:5])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2)])
def test_a_token_is_the_same_alone_as_in_any_chunk_of_its_prompt(
    isa, threads, window, num_heads, num_kv_heads
):
    batch = paged_batch(
        [150], [300], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=20, seed=1
    )
    whole = run(batch, 0.3, window)
    for first, stop in [(0, 1), (5, 9), (64, 150), (106, 107), (149, 150)]:
        part = SequenceLayout(
            query_lens=(stop - first,),
            context_lens=(150 + stop,),
            cu_query_lens=torch.tensor([0, stop - first], dtype=torch.int32),
            context_lens_device=torch.tensor([150 + stop], dtype=torch.int32),
            block_tables=batch.layout.block_tables,
        )
        alone = paged_attention(
            batch.query[first:stop], batch.key_cache, batch.value_cache, part, 0.3, window
        )
        assert torch.equal(alone, whole[first:stop])
