import torch

from multiexit_engine.ops import biased_paged_attention
from tests.ops.paged import attention_truth, paged_batch

SCALE, REACH = 0.7, 6
QUERY_LENS, CONTEXT_LENS = [1, 5, 3, 1], [9, 5, 11, 1]


def batch():
    return paged_batch(QUERY_LENS, CONTEXT_LENS, num_heads=3, num_kv_heads=3)


def run(own, bias):
    return biased_paged_attention(
        own.query, own.key_cache, own.value_cache, own.layout, SCALE, bias
    )


def one_by_one(own, bias):
    rows = []
    for seq, (query_len, context) in enumerate(zip(QUERY_LENS, CONTEXT_LENS, strict=True)):
        start = own.layout.query_starts[seq]
        keys, values = own.keys[seq].double(), own.values[seq].double()
        for place in range(query_len):
            stop = context - query_len + place + 1
            scores = torch.einsum("khd,hd->hk", keys[:stop], own.query[start + place].double())
            distance = torch.arange(stop - 1, -1, -1).clamp(max=REACH - 1)
            weights = (scores * SCALE + bias[:, distance].double()).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, values[:stop]))
    return torch.stack(rows)


def test_each_distance_adds_its_bias_and_far_ones_the_last():
    own = batch()
    bias = torch.randn(3, REACH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(own, bias).double(), one_by_one(own, bias), atol=2e-6, rtol=0)


def test_no_bias_is_paged_attention():
    own = batch()
    found = run(own, torch.zeros(3, REACH)).double()
    torch.testing.assert_close(found, attention_truth(own, SCALE, None), atol=2e-6, rtol=0)
