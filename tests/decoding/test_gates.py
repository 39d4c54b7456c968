"""Measures of ``EarlyExit`` and what a shortlist may say of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiexit_engine.decoding.gates import (
    bounds,
    joint_statistics,
    passes,
    read_head,
    similarity,
)
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.modes import EarlyExit
from multiexit_engine.ops import head_statistics

MEASURES = ["max_prob", "margin", "entropy"]


def operands(seed, rows=5, vocab=37, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=draw) * scale
    return HeadOperands(hidden, torch.randn(vocab, 16, generator=draw), None)


def test_measures_are_those_of_the_softmax():
    head = operands(1)
    p = (head.hidden.double() @ head.weight.double().T).softmax(-1)
    best, second = p.topk(2).values.unbind(-1)
    expected = torch.stack((best, best - second, -(p * p.log()).sum(-1)))
    for row, measure in enumerate(MEASURES):
        found = read_head([measure] * 5, head)
        torch.testing.assert_close(found.values, expected[row].float(), atol=1e-6, rtol=1e-5)
        assert found.tokens.tolist() == p.argmax(-1).tolist()
    mixed = read_head([*MEASURES, "margin", "entropy"], head).values
    torch.testing.assert_close(mixed, expected[[0, 1, 2, 1, 2], range(5)].float())


@given(st.integers(0, 10**6), st.integers(2, 36), st.sampled_from([0.1, 0.5, 2.0]))
def test_a_shortlist_with_the_best_token_rules_out_no_row_that_passes(seed, shortlist, scale):
    head = operands(seed, scale=scale)
    for measure in MEASURES:
        exact = read_head([measure] * 5, head)
        bound = bounds([measure] * 5, head, shortlist)
        listed = exact.tokens < shortlist
        slack = 1e-5 if measure == "entropy" else -1e-5
        mode = EarlyExit(0.0, measure)
        for value, limit in zip(exact.values[listed], bound[listed], strict=True):
            # the threshold that the row just passes
            assert passes(EarlyExit(float(value) + slack, mode.measure), float(limit))


@pytest.mark.parametrize("measure", [*MEASURES, "patience"])
def test_a_row_of_nan_passes_no_threshold(measure):
    head = operands(3)
    head.hidden[2] = torch.nan
    values = read_head([measure] * 5, head).values
    assert values.isnan().tolist() == [False, False, True, False, False]
    assert not passes(EarlyExit(2, measure), float(values[2]))


@given(st.integers(1, 40), st.integers(1, 2000), st.integers(0, 10**6))
def test_similarity_of_a_row_does_not_depend_on_the_others(rows, width, seed):
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, rows, width, generator=draw)
    found = similarity(one, other)
    alone = torch.cat([similarity(one[i : i + 1], other[i : i + 1]) for i in range(rows)])
    assert torch.equal(found, alone)
    expected = torch.cosine_similarity(one.double(), other.double()).float()
    torch.testing.assert_close(found, expected)


def test_heads_are_measured_together_as_alone():
    """Two of one matrix beside one of its own, in any order."""
    first, other = operands(1), operands(2, rows=3)
    heads = [first, other, first._replace(hidden=first.hidden[:2] * 0.5)]
    for own, found in zip(heads, joint_statistics(heads), strict=True):
        alone = head_statistics(*own)
        assert torch.equal(found.tokens, alone.tokens)
        torch.testing.assert_close(found.entropy, alone.entropy)
