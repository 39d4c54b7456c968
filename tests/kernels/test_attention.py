import pytest
import torch

from tests.ops.paged import attention_truth, paged_batch

paged_attention = pytest.importorskip("multiexit_engine.kernels.attention").paged_attention

# query lengths and context lengths: decode, drafts to verify, prefill chunks, all at once
BATCHES = [([1, 1], [1, 530]), ([2, 1, 16], [300, 5, 16]), ([20, 1, 17], [60, 280, 17])]
# heads, key-value heads, width: one key-value head for each, shared, no power of two
HEADS = [(4, 4, 16), (6, 2, 8), (5, 1, 24)]


def assert_close(batch, window, tolerance):
    actual = paged_attention(
        batch.query, batch.key_cache, batch.value_cache, batch.layout, 0.3, window
    ).double()
    truth = attention_truth(batch, 0.3, window).to(actual.device)
    assert ((actual - truth).norm() / truth.norm()).item() < tolerance


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 7, 260])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
def test_half_precision_equals_the_formula(lengths, heads, window, dtype, device):
    num_heads, num_kv_heads, head_dim = heads
    batch = paged_batch(
        *lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, device=device,
    )  # fmt: skip
    assert_close(batch, window, 1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_fused_queries_are_read_where_they_lie(device):
    batch = paged_batch([3, 1], [30, 9], num_heads=4, num_kv_heads=4, head_dim=16, device=device)
    fused = torch.cat([batch.query, batch.query.flip(0)], dim=1)
    strided = type(batch)(fused[:, :4], *list(vars(batch).values())[1:])
    assert strided.query.stride(0) == 2 * batch.query.stride(0)
    assert_close(strided, None, 1e-6)


def test_a_sequence_does_not_know_its_batch_mates(device):
    batch = paged_batch([1, 9, 1], [700, 9, 40], num_heads=2, num_kv_heads=1, device=device)
    caches = (batch.key_cache, batch.value_cache)
    together = paged_attention(batch.query, *caches, batch.layout, 0.3, None)
    alone = paged_attention(batch.query[:1], *caches, batch.layout.first(1), 0.3, None)
    assert torch.equal(together[:1], alone)
