"""What rough logits decide is what the exact ones say."""

import pytest
import torch

from multiexit_engine.decoding.certainty import certain_rows, lone_best_tokens
from multiexit_engine.ops import head_statistics
from multiexit_engine.ops.heads import statistics_of_logits
from tests.ops.test_coded_head_statistics import SHAPES, coded, operands


def verdict(probability, error, threshold):
    """Of a row of two tokens."""
    logits = torch.tensor([[probability, 1 - probability]]).log()
    errors = torch.tensor([error], dtype=torch.float64)
    sure, unsure = certain_rows(statistics_of_logits(logits), errors, ["max_prob"], [threshold])
    return sure.item(), unsure.item()


def test_near_one_an_error_changes_a_probability_by_little():
    # 0.99 / 0.01 times exp(-0.4) is 66, or 0.985
    assert verdict(0.99, 0.2, 0.98) == (True, False)
    assert verdict(0.99, 0.2, 0.989) == (False, False)


def test_a_greatest_probability_of_a_third_may_not_become_a_half():
    # 0.35 / 0.65 times exp(0.4) is 0.8
    assert verdict(0.65, 0.2, 0.8) == (False, True)
    assert verdict(0.65, 0.2, 0.7) == (False, False)


def test_no_error_widens_probabilities_beyond_their_range():
    assert verdict(1.0, 0.5, 1.0) == (False, False)
    assert verdict(0.5, 50.0, 0.0) == (True, False)


@SHAPES
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
def test_a_lone_best_token_is_the_exact_one(rows, vocab, size, spread):
    hidden, weight, bias = operands(rows, vocab, size, spread)
    rough, errors = coded(hidden, weight, bias)
    is_lone = lone_best_tokens(rough, errors)
    exact = head_statistics(hidden, weight, bias).tokens
    assert torch.equal(rough.tokens[is_lone], exact[is_lone])
    if spread == 30.0 and vocab > 1:
        assert is_lone.any()


def test_equals_are_not_lone_and_neither_is_what_is_no_number():
    logits = torch.tensor([[3.0, 3.0, 0.0], [3.0, 2.0, 0.0], [torch.nan, 9.0, 0.0]])
    found = statistics_of_logits(logits)
    errors = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64)
    assert lone_best_tokens(found, errors).tolist() == [False, True, False]
    assert not lone_best_tokens(found, torch.full((3,), torch.nan)).any()
