import torch

from multiexit_engine.ops import biased_packed_attention, packed_attention

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
    found = biased_packed_attention(*rows, LENS, SCALE, bias.double())
    torch.testing.assert_close(found, one_by_one(*rows, bias.double()), atol=1e-12, rtol=0)


def test_no_bias_is_packed_attention():
    rows, bias = inputs()
    found = biased_packed_attention(*rows, LENS, SCALE, torch.zeros_like(bias).double())
    wanted = packed_attention.reference(*rows, LENS, LENS, SCALE)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
