import pytest
import torch

from multiexit_engine.ops import packed_attention

HEADS, HEAD_DIM, SCALE = 3, 5, 0.3


def inputs(query_lens, key_lens):
    generator = torch.Generator().manual_seed(0)
    rows = sum(query_lens), sum(key_lens), sum(key_lens)
    return tuple(torch.randn(n, HEADS, HEAD_DIM, generator=generator).double() for n in rows)


def one_by_one(query, key, value, query_lens, key_lens):
    """The formula, a sequence and a head at a time."""
    results = []
    parts = zip(query.split(query_lens), key.split(key_lens), value.split(key_lens), strict=True)
    for q, k, v in parts:
        weights = (torch.einsum("qhd,khd->hqk", q, k) * SCALE).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(results)


@pytest.mark.parametrize(
    ("query_lens", "key_lens"),
    [
        ([4], [4]),
        ([2, 2, 2, 1], [7, 7, 3, 3]),
        ([1, 0, 5], [2, 3, 1]),
        ([0, 0], [1, 1]),
    ],
)
def test_every_query_sees_all_keys_of_its_own_sequence(query_lens, key_lens):
    query, key, value = inputs(query_lens, key_lens)
    found = packed_attention(query, key, value, query_lens, key_lens, SCALE)
    wanted = one_by_one(query, key, value, query_lens, key_lens)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
