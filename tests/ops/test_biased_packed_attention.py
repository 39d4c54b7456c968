import pytest
import torch

from multiexit_engine.ops import biased_packed_attention, packed_attention
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

HEADS, HEAD_DIM, REACH, SCALE = 3, 5, 2, 0.7
LENS = [4, 1, 6]


def inputs():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(sum(LENS), HEADS, HEAD_DIM, generator=generator) for _ in range(3)]
    return [x.double() for x in rows], torch.randn(HEADS, 2 * REACH + 1, generator=generator)


def one_by_one(query, key, value, bias):
    results = []
    for q, k, v in zip(*(x.split(LENS) for x in (query, key, value)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        for row in range(len(q)):
            for place in range(len(q)):
                distance = max(-REACH, min(REACH, row - place))
                scores[:, row, place] += bias[:, REACH + distance]
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(results)


def test_each_distance_adds_its_bias_and_far_ones_the_last():
    rows, bias = inputs()
    found = biased_packed_attention.reference(*rows, LENS, SCALE, bias.double())
    torch.testing.assert_close(found, one_by_one(*rows, bias.double()), atol=1e-12, rtol=0)


def test_no_bias_is_packed_attention():
    rows, bias = inputs()
    found = biased_packed_attention.reference(*rows, LENS, SCALE, torch.zeros_like(bias).double())
    wanted = packed_attention.reference(*rows, LENS, LENS, SCALE)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@all_backends(biased_packed_attention)
@pytest.mark.parametrize("lens", [[1], [7, 1, 63], [100, 3, 131]], ids=str)
@pytest.mark.parametrize("reach", [0, 5, 200])
def test_backend_is_as_good_as_the_reference(backend, lens, reach):
    function = implementation_or_skip(biased_packed_attention, backend)
    device = device_for(biased_packed_attention, backend)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(sum(lens), 3, 20, generator=generator).to(device) for _ in range(3)]
    bias = torch.randn(3, 2 * reach + 1, generator=generator).to(device)
    args = (*rows, lens, SCALE, bias)
    assert_as_good_as_reference(biased_packed_attention, function(*args), args, 3e-6)
