"""Products of codes on every instruction set, held against the reference."""

import pytest
import torch

from multiexit_engine import ops
from multiexit_engine._native import rough_head_sums
from tests.ops.test_rough_head_sums import SHAPES, coded, operands


@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_terms", [1, 2, 3])
def test_equal_the_reference(isa, rows, vocab, size, has_bias, num_terms):
    hidden, weight, bias = operands(rows, vocab, size)
    bias = bias if has_bias else None
    actual, _ = coded(hidden, weight, bias, rough_head_sums, num_terms)
    expected, _ = coded(hidden, weight, bias, ops.rough_head_sums.reference, num_terms)
    assert actual.tokens.tolist() == expected.tokens.tolist()
    for mine, wanted in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=2e-5)


def test_the_greatest_codes_do_not_overflow(isa):
    signs = torch.ones(3, 4096)
    signs[1] = -1
    weight = signs[:2].repeat(1100, 1) * torch.linspace(0.9, 1, 2200)[:, None]
    found, _ = coded(signs, weight, None, rough_head_sums, has_spread=False)
    assert found.tokens.tolist() == [2198, 2199, 2198]
    wanted = torch.tensor([weight[2198, 0], -weight[2199, 0], weight[2198, 0]]).double() * 4096
    torch.testing.assert_close(found.best, wanted, atol=0, rtol=2e-5)


@pytest.mark.parametrize("num_terms", [1, 2, 3])
def test_bits_do_not_depend_on_threads_or_other_rows(isa, threads, num_terms):
    hidden, weight, bias = operands(70, 3001, 48)
    whole, _ = coded(hidden, weight, bias, rough_head_sums, num_terms)
    for row in (0, 7, 69):
        alone, _ = coded(hidden[row : row + 1], weight, bias, rough_head_sums, num_terms)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


def test_nothing_beyond_the_vocabulary_is_read(isa):
    hidden, weight, bias = operands(3, 2500, 48)
    alone, _ = coded(hidden, weight, bias, rough_head_sums)
    room = torch.full((3000, 48), torch.nan)
    room[:2500] = weight
    longer = torch.full((3000,), torch.nan)
    longer[:2500] = bias
    found, _ = coded(hidden, room[:2500], longer[:2500], rough_head_sums)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
