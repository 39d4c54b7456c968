import pytest
import torch

from multiexit_engine.ops import paged_attention
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)
from tests.ops.paged import attention_truth, paged_batch

BATCHES = pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [1]),
        ([7], [7]),
        ([1, 1, 1], [5, 5, 5]),
        ([1, 1, 1, 1], [1, 63, 100, 300]),
        ([5, 1, 9, 1, 2], [12, 1, 9, 31, 2]),
        ([3, 63], [100, 63]),
    ],
)
WINDOWS = pytest.mark.parametrize("window", [None, 1, 6, 1000])
HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (5, 1)])


@HEADS
@WINDOWS
@BATCHES
def test_reference_equals_the_formula(query_lens, context_lens, window, num_heads, num_kv_heads):
    batch = paged_batch(query_lens, context_lens, num_heads=num_heads, num_kv_heads=num_kv_heads)
    actual = paged_attention.reference(
        batch.query, batch.key_cache, batch.value_cache, batch.layout, 0.3, window
    )
    torch.testing.assert_close(
        actual.double(), attention_truth(batch, 0.3, window), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_size_does_not_change_the_result(block_size):
    batch = paged_batch([4, 1, 1], [9, 17, 3], block_size=block_size)
    actual = paged_attention.reference(
        batch.query, batch.key_cache, batch.value_cache, batch.layout, 0.3, None
    )
    torch.testing.assert_close(
        actual.double(), attention_truth(batch, 0.3, None), atol=2e-6, rtol=0
    )


def test_unscaled_half_precision_scores_do_not_overflow():
    batch = paged_batch([1, 3], [9, 3], head_dim=64, dtype=torch.float16)
    query = batch.query * 100
    big = type(batch)(
        query, batch.key_cache * 100, batch.value_cache, batch.layout,
        [key * 100 for key in batch.keys], batch.values,
    )  # fmt: skip
    actual = paged_attention.reference(
        big.query, big.key_cache, big.value_cache, big.layout, 1.0, None
    )
    torch.testing.assert_close(actual.double(), attention_truth(big, 1.0, None), atol=2e-3, rtol=0)


def test_layout_of_the_first_sequences_gives_their_rows():
    batch = paged_batch([4, 1, 1], [9, 17, 3])
    caches = batch.key_cache, batch.value_cache
    whole = paged_attention.reference(batch.query, *caches, batch.layout, 0.3, 5)
    first = paged_attention.reference(batch.query[:5], *caches, batch.layout.first(2), 0.3, 5)
    torch.testing.assert_close(first, whole[:5], atol=1e-6, rtol=0)


@all_backends(paged_attention)
@HEADS
@WINDOWS
@BATCHES
def test_backend_is_as_good_as_the_reference(
    backend, query_lens, context_lens, window, num_heads, num_kv_heads
):
    function = implementation_or_skip(paged_attention, backend)
    batch = paged_batch(
        query_lens,
        context_lens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        device=device_for(paged_attention, backend),
    )
    args = (batch.query, batch.key_cache, batch.value_cache, batch.layout, 0.3, window)
    assert_as_good_as_reference(paged_attention, function(*args), args, 2e-6)
