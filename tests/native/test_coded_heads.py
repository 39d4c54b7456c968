"""Products of codes on every instruction set, held against the reference."""

import pytest
import torch

from multiexit_engine import ops
from multiexit_engine._native import coded_head_statistics
from tests.ops.test_coded_head_statistics import SHAPES, coded, operands


@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_equal_the_reference(isa, rows, vocab, size, has_bias, num_terms):
    hidden, weight, bias = operands(rows, vocab, size)
    bias = bias if has_bias else None
    actual, _ = coded(hidden, weight, bias, coded_head_statistics, num_terms)
    reference = ops.coded_head_statistics.reference
    expected, _ = coded(hidden, weight, bias, reference, num_terms)
    assert actual.tokens.tolist() == expected.tokens.tolist()
    for mine, wanted in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=2e-5)


def test_the_greatest_codes_do_not_overflow(isa):
    signs = torch.ones(3, 4096)
    signs[1] = -1
    found, _ = coded(signs, signs[:2], None, coded_head_statistics)
    assert found.tokens.tolist() == [0, 1, 0]
    torch.testing.assert_close(found.log_sum_exp, torch.full((3,), 4096.0))


@pytest.mark.parametrize("num_terms", [1, 2])
def test_bits_do_not_depend_on_threads_or_other_rows(isa, threads, num_terms):
    hidden, weight, bias = operands(25, 3001, 48)
    whole, _ = coded(hidden, weight, bias, coded_head_statistics, num_terms)
    for row in (0, 7, 24):
        alone, _ = coded(hidden[row : row + 1], weight, bias, coded_head_statistics, num_terms)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))
