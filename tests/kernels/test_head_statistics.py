import math

import pytest
import torch

from multiexit_engine import ops
from tests.ops.test_head_statistics import assert_equal_to, truth

kernels = pytest.importorskip("multiexit_engine.kernels.head_statistics")
head_statistics = kernels.head_statistics


def operands(rows, vocab, width, dtype=torch.float32):
    """Numbers whose logits spread over some three units."""
    generator = torch.Generator().manual_seed(0)
    scale = (3.0 * width**-0.5) ** 0.5
    shapes = (rows, width), (vocab, width), (vocab,)
    hidden, weight, bias = (torch.randn(s, generator=generator) for s in shapes)
    return (hidden * scale).to(dtype), (weight * scale).to(dtype), bias.to(dtype)


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def host(found):
    return type(found)(*(values.cpu() for values in found))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 4), (1, 1031, 100), (7, 63, 7), (17, 130, 32), (40, 100, 48), (66, 70, 16)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_equal_the_definitions(shape, dtype, has_bias, device):
    hidden, weight, bias = operands(*shape, dtype)
    args = (hidden, weight, bias) if has_bias else (hidden, weight)
    assert_equal_to(host(head_statistics(*on(device, *args))), truth(*args), 1e-4)


@pytest.mark.parametrize("shortlist", [1, 33, 99])
def test_a_shortlist_reads_nothing_behind_it(shortlist, device):
    hidden, weight, bias = operands(3, 100, 48)
    expected = truth(hidden, weight[:shortlist], bias[:shortlist])
    weight[shortlist:], bias[shortlist:] = math.nan, math.nan
    found = head_statistics(*on(device, hidden, weight, bias), shortlist)
    assert_equal_to(host(found), expected, 1e-4)


@pytest.mark.parametrize("shortlist", [0, 8])
def test_a_shortlist_beyond_the_vocabulary_is_refused(shortlist, device):
    with pytest.raises(ValueError, match="has 7 tokens"):
        head_statistics(*on(device, *operands(1, 7, 4)), shortlist)


def test_a_tie_goes_to_the_lowest_id_and_leaves_no_margin(device):
    bias = torch.full((100,), -1.0)
    bias[[70, 40, 41]] = 2.0  # two in one tile, one in another
    found = head_statistics(*on(device, torch.zeros(1, 3), torch.zeros(100, 3), bias))
    assert found.tokens.tolist() == [40]
    assert torch.equal(found.log_probs, found.second_log_probs)


def test_impossible_tokens_count_for_nothing(device):
    hidden, weight, bias = operands(2, 100, 16)
    bias[3:77] = -math.inf  # whole tiles of them
    expected = ops.head_statistics.reference(hidden, weight, bias)
    found = host(head_statistics(*on(device, hidden, weight, bias)))
    assert_equal_to(found, expected, 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_is_nan_and_breaks_no_other(value, device):
    hidden, weight, bias = operands(3, 100, 63)
    hidden[1] = 0.0
    hidden[1, 0] = value
    found = host(head_statistics(*on(device, hidden, weight.abs(), bias)))
    for values in found[1:]:
        assert values.isnan().tolist() == [False, True, False]


def test_the_fields_are_those_of_the_op():
    assert kernels.HeadStatistics._fields == ops.HeadStatistics._fields
