import pytest
import torch

from multiexit_engine.ops import packed_attention
from tests.ops.backends import all_backends, assert_as_good_as_reference, implementation_or_skip

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


CASES = [
    # query_lens, key_lens, heads, head_dim
    ([64], [64], 2, 64),
    ([70, 0, 1, 33], [130, 3, 1, 97], 3, 20),
    ([1, 200], [1031, 7], 1, 5),
    ([3, 2], [17, 16], 4, 100),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@all_backends(packed_attention)
def test_backends_are_as_good_as_the_reference_on_rows_that_lie_apart(backend, dtype, case):
    query_lens, key_lens, heads, head_dim = case
    generator = torch.Generator().manual_seed(1)

    def rows(count, parts):
        """Of a wider tensor with NaN between them and behind."""
        wide = torch.full((count, parts + 1, heads, head_dim), torch.nan, dtype=dtype)
        wide[:, :parts] = torch.randn(count, parts, heads, head_dim, generator=generator)
        return wide[:, :parts].unbind(1)

    (query,) = rows(sum(query_lens), 1)
    key, value = rows(sum(key_lens), 2)
    args = (query, key, value, query_lens, key_lens, head_dim**-0.5)
    found = implementation_or_skip(packed_attention, backend)(*args)
    tolerance = 2e-6 if dtype is torch.float32 else 2e-3
    if backend == "triton" and dtype is torch.bfloat16:
        tolerance = 8e-3  # tensor cores take the weights of the values in bfloat16, too
    assert_as_good_as_reference(packed_attention, found, args, tolerance)


@all_backends(packed_attention)
def test_a_sequence_does_not_depend_on_the_others(backend):
    attend = implementation_or_skip(packed_attention, backend)
    query, key, value = (part.float() for part in inputs([5, 66, 2], [9, 70, 4]))
    together = attend(query, key, value, [5, 66, 2], [9, 70, 4], SCALE)
    alone = attend(query[5:71], key[9:79], value[9:79], [66], [70], SCALE)
    last = attend(query[70:71], key[9:79], value[9:79], [1], [70], SCALE)
    assert torch.equal(together[5:71], alone)
    assert torch.equal(alone[-1:], last)
