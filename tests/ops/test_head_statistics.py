import math

import pytest
import torch

from multiexit_engine.ops import head_statistics
from multiexit_engine.quantization import Quantization, dequantize, quantize
from tests.ops.test_head_logits import SHAPES, operands


def truth(hidden, weight, bias=None):
    """By one definition after the other, in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    probs = logits.softmax(-1)
    best = probs.sort(-1, descending=True)
    second = (
        best.values[:, 1].log() if logits.shape[1] > 1 else torch.full_like(probs[:, 0], -math.inf)
    )
    entropy = torch.distributions.Categorical(probs=probs).entropy()
    return best.indices[:, 0], best.values[:, 0].log(), second, logits.exp().sum(-1).log(), entropy


def assert_equal_to(actual, expected, tolerance=2e-5):
    assert torch.equal(actual.tokens, expected[0])
    for own, other in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=tolerance, atol=tolerance)


@SHAPES
def test_reference_equals_the_definitions(rows, vocab, hidden_size):
    args = operands(rows, vocab, hidden_size)
    actual = head_statistics.reference(*args)
    assert all(values.dtype is torch.float32 for values in actual[1:])
    assert_equal_to(actual, truth(*args))


@pytest.mark.parametrize("shortlist", [1, 2, 64, 100])
def test_a_shortlist_is_a_smaller_head(shortlist):
    hidden, weight, bias = operands(3, 100, 63)
    actual = head_statistics.reference(hidden, weight, bias, shortlist)
    assert_equal_to(actual, truth(hidden, weight[:shortlist], bias[:shortlist]))


def test_quantized_heads_have_shortlists_too():
    hidden, weight, bias = operands(3, 100, 63)
    weight = quantize(weight, Quantization(4))
    actual = head_statistics.reference(hidden, weight, bias, 37)
    assert_equal_to(actual, truth(hidden, dequantize(weight)[:37], bias[:37]))


@pytest.mark.parametrize("shortlist", [0, -1, 8])
def test_a_shortlist_beyond_the_vocabulary_is_refused(shortlist):
    with pytest.raises(ValueError, match="it has 7"):
        head_statistics(*operands(1, 7, 4), shortlist)


def test_a_tie_goes_to_the_lowest_id_and_leaves_no_margin():
    bias = torch.tensor([0.0, 2.0, -1.0, 2.0])
    found = head_statistics(torch.zeros(1, 3), torch.zeros(4, 3), bias)
    assert found.tokens.tolist() == [1]
    assert torch.equal(found.log_probs, found.second_log_probs)


def test_impossible_tokens_count_for_nothing():
    bias = torch.tensor([0.0, -math.inf, 1.0, -math.inf])
    found = head_statistics(torch.zeros(1, 3), torch.zeros(4, 3), bias)
    torch.testing.assert_close(
        found.entropy, head_statistics(torch.zeros(1, 3), torch.zeros(2, 3), bias[[0, 2]]).entropy
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_is_nan_and_breaks_no_other(value):
    hidden, weight, bias = operands(3, 100, 63)
    hidden[1] = 0.0
    hidden[1, 0] = value
    found = head_statistics(hidden, weight.abs(), bias)
    for values in found[1:]:
        assert values.isnan().tolist() == [False, True, False]
