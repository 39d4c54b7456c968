"""Statistics of heads on every instruction set, held against float64."""

import math

import pytest
import torch

from multiexit_engine import ops
from multiexit_engine._native import head_statistics
from multiexit_engine.quantization import Quantization, as_tensor
from tests.native.test_dense import poisoned
from tests.native.test_quantized import quantized
from tests.ops.test_head_statistics import assert_equal_to, truth

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SHAPES = pytest.mark.parametrize(
    ("rows", "vocab", "hidden_size"),
    [(1, 1, 4), (1, 2, 9), (2, 17, 5), (3, 513, 33), (9, 1031, 48), (1, 3001, 63)],
)


def operands(rows, vocab, hidden_size, dtype=torch.float32):
    """Numbers whose logits spread over some three units."""
    scale = (3.0 * hidden_size**-0.5) ** 0.5
    hidden, weight = (
        poisoned((rows, hidden_size), dtype, 0),
        poisoned((vocab, hidden_size), dtype, 1),
    )
    return hidden.mul_(scale), weight.mul_(scale), poisoned((vocab,), dtype, 2)


@DTYPES
@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
def test_equal_the_definitions(isa, dtype, rows, vocab, hidden_size, has_bias):
    hidden, weight, bias = operands(rows, vocab, hidden_size, dtype)
    args = (hidden, weight, bias if has_bias else None)
    assert_equal_to(head_statistics(*args), truth(*args))


@pytest.mark.parametrize("how", [Quantization(8), Quantization(4, 64)], ids=str)
@pytest.mark.parametrize("shortlist", [None, 1, 700])
def test_of_quantized_heads_equal_the_definitions(isa, how, shortlist):
    hidden, weight = poisoned((5, 100), torch.float32, 0).mul_(0.2), quantized((1031, 100), how)
    expected = truth(hidden, as_tensor(weight, torch.float64)[:shortlist])
    assert_equal_to(head_statistics(hidden, weight, None, shortlist), expected)


@DTYPES
@pytest.mark.parametrize("shortlist", [1, 512, 513, 1030])
def test_a_shortlist_reads_nothing_behind_it(isa, dtype, shortlist):
    hidden, weight, bias = operands(3, 1031, 48, dtype)
    expected = truth(hidden, weight[:shortlist], bias[:shortlist])
    weight[shortlist:], bias[shortlist:] = math.nan, math.nan
    assert_equal_to(head_statistics(hidden, weight, bias, shortlist), expected)


@DTYPES
def test_bits_do_not_depend_on_threads_or_other_rows(isa, threads, dtype):
    hidden, weight, bias = operands(9, 3001, 48, dtype)
    torch.set_num_threads(1)
    whole = head_statistics(hidden, weight, bias)
    torch.set_num_threads(threads)
    for start, stop in [(0, 9), (0, 1), (3, 5), (8, 9)]:
        part = head_statistics(hidden[start:stop], weight, bias)
        for own, all_rows in zip(part, whole, strict=True):
            assert torch.equal(own, all_rows[start:stop])


def test_special_logits_are_what_the_reference_says(isa):
    bias = torch.randn(8, 1300, generator=torch.Generator().manual_seed(0))
    bias[0, 3] = bias[0, 1290] = 9.0
    bias[1, :600] = -math.inf
    bias[2] = -math.inf
    bias[3, 1299] = math.nan
    bias[4, 0] = math.nan
    bias[5, 700] = math.inf
    bias[6] = -math.inf
    bias[6, 1299] = -5.0
    bias[7] *= 1e30
    for row in bias:
        args = torch.zeros(1, 3), torch.zeros(1300, 3), row
        actual, expected = head_statistics(*args), ops.head_statistics.reference(*args)
        for own, other in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(own, other, equal_nan=True, rtol=1e-5, atol=1e-5)
        if not expected.entropy.isnan():
            assert torch.equal(actual.tokens, expected.tokens)


def test_certain_rows_have_no_entropy_and_flat_ones_the_most(isa):
    weight = torch.zeros(5000, 3)
    flat = head_statistics(torch.ones(1, 3), weight)
    torch.testing.assert_close(flat.entropy, torch.tensor([math.log(5000)]))
    weight[4321] = 100.0
    certain = head_statistics(torch.ones(1, 3), weight)
    assert certain.entropy.item() == 0.0 and certain.log_probs.item() == 0.0
