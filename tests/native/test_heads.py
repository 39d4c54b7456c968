"""Heads, contrasts and tokens on every instruction set, held against float64."""

import math

import pytest
import torch

from multiexit_engine import ops
from multiexit_engine._native import (
    contrast_heads,
    contrast_tokens,
    head_logits,
    head_tokens,
    sample_tokens,
    shared_head_tokens,
)
from multiexit_engine.ops.tokens import RowGroup
from tests.native.test_dense import poisoned

SHAPES = pytest.mark.parametrize(
    ("rows", "vocab", "hidden_size"), [(1, 7, 4), (1, 3001, 63), (3, 100, 33), (9, 1031, 48)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def operands(rows, vocab, hidden_size, dtype=torch.float32):
    """Hidden states and weights of two heads whose logits spread over about three units."""
    scale = (3.0 * hidden_size**-0.5) ** 0.5
    shapes = [(rows, hidden_size), (vocab, hidden_size)] * 2
    return [poisoned(shape, dtype, seed).mul_(scale) for seed, shape in enumerate(shapes)]


def truth(args, alpha):
    upper, upper_weight, lower, lower_weight = (x.double() for x in args)
    return ops.contrast_logits.reference(upper @ upper_weight.T, lower @ lower_weight.T, alpha)


def choices(rows, temperature):
    seeds = torch.arange(rows) * 7919 - 3
    return torch.full((rows,), temperature), seeds, torch.arange(rows) + 5


@DTYPES
@SHAPES
@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.1, 0.9, 1.0])
def test_contrast_equals_the_formula(isa, dtype, rows, vocab, hidden_size, alpha):
    args, alphas = operands(rows, vocab, hidden_size, dtype), torch.full((rows,), alpha)
    actual = contrast_heads(*args, alphas)
    torch.testing.assert_close(actual.double(), truth(args, alphas), rtol=0, atol=2e-5)


@SHAPES
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 3.0])
def test_tokens_are_those_of_the_reference(isa, rows, vocab, hidden_size, temperature):
    args, alphas = operands(rows, vocab, hidden_size), torch.full((rows,), 0.05)
    how = choices(rows, temperature)
    for function, reference, own in (
        (head_tokens, ops.head_tokens.reference, (*args[:2], None)),
        (contrast_tokens, ops.contrast_tokens.reference, (*args, alphas)),
    ):
        wide = [x.double() if torch.is_tensor(x) else x for x in own]
        tokens, log_probs = function(*own, *how)
        expected, expected_log_probs = reference(*wide, *how)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(log_probs.double(), expected_log_probs, rtol=0, atol=2e-5)


def test_sampled_tokens_are_those_of_the_sampler(isa):
    hidden, weight, *_ = operands(1, 2000, 16)
    temperature, _, _ = choices(1, 0.9)
    logits = head_logits(hidden, weight) / 0.9
    for seed in range(200):
        state = torch.tensor([seed * 2**31 - 5]), torch.tensor([seed % 7])
        tokens, _ = head_tokens(hidden, weight, None, temperature, *state)
        assert torch.equal(tokens, ops.sample_tokens.reference(logits, *state))


def test_bits_do_not_depend_on_threads_or_other_rows(isa, threads):
    args, alphas = operands(9, 3001, 48), torch.tensor([0.1, 1e-3, 0.5] * 3)
    torch.set_num_threads(1)
    whole = contrast_heads(*args, alphas)
    torch.set_num_threads(threads)
    assert torch.equal(contrast_heads(*args, alphas), whole)
    for row in range(9):
        one = slice(row, row + 1)
        alone = contrast_heads(args[0][one], args[1], args[2][one], args[3], alphas[one])
        assert torch.equal(alone, whole[one])
    assert torch.equal(head_logits(args[0][3:5], args[1]), head_logits(*args[:2])[3:5])


def test_lower_head_is_read_at_candidates_only(isa):
    upper, weight, lower, lower_weight = operands(1, 1000, 8)
    logits = head_logits(upper, weight)
    poison = lower_weight.clone()
    poison[logits[0] < logits.max() + math.log(0.1)] = torch.nan
    alpha = torch.tensor([0.1])
    expected = contrast_heads(upper, weight, lower, lower_weight, alpha)
    assert torch.equal(contrast_heads(upper, weight, lower, poison, alpha), expected)


@pytest.mark.parametrize("lower_value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("upper_value", [None, torch.inf, -torch.inf])
def test_infinite_logits_give_no_nan(isa, upper_value, lower_value):
    upper, weight, lower, lower_weight = operands(2, 50, 8)
    upper, lower = upper.abs(), lower.abs()
    lower_weight[::2] = lower_value
    if upper_value is not None:
        weight[3] = upper_value
    alphas = torch.full((2,), 1e-3)
    expected = ops.contrast_heads.reference(upper, weight, lower, lower_weight, alphas)
    actual = contrast_heads(upper, weight, lower, lower_weight, alphas)
    assert not actual.isnan().any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_nan_of_a_row_is_seen_in_its_probability_alone(isa):
    hidden, weight, *_ = operands(3, 600, 8)
    hidden[1, 2] = torch.nan
    for temperature in (0.0, 1.0):
        how = choices(3, temperature)
        _, one = head_tokens(hidden, weight, None, *how)
        _, two = contrast_tokens(hidden, weight, hidden, weight, torch.full((3,), 0.1), *how)
        assert one.isnan().tolist() == two.isnan().tolist() == [False, True, False]


def test_of_equal_logits_the_lowest_token_is_taken(isa):
    hidden = torch.ones(1, 4)
    weight = torch.zeros(2000, 4)
    weight[[700, 702, 1500]] = 1.0
    tokens, _ = head_tokens(hidden, weight, None, *choices(1, 0.0))
    assert tokens.tolist() == [700]


def test_bias_is_added(isa):
    hidden, weight, *_ = operands(2, 600, 8)
    bias = torch.randn(600, generator=torch.Generator().manual_seed(0))
    expected = hidden.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(
        head_logits(hidden, weight, bias).double(), expected, rtol=0, atol=1e-5
    )
    tokens, _ = head_tokens(hidden, weight, bias, *choices(2, 0.0))
    assert torch.equal(tokens, expected.argmax(-1))


@pytest.mark.parametrize("vocab", [1, 7, 64, 1031, 5000])
@pytest.mark.parametrize("kept", [1.0, 0.02])
def test_samples_are_the_argmax_of_scores_and_noise(isa, vocab, kept):
    generator = torch.Generator().manual_seed(vocab)
    scores = 5 * torch.randn(20, vocab, generator=generator)
    scores[torch.rand(20, vocab, generator=generator) > kept] = -torch.inf
    state = torch.arange(20) * 2**33 - 7, torch.arange(20) * 11
    assert torch.equal(sample_tokens(scores, *state), ops.sample_tokens.reference(scores, *state))


def test_a_sample_among_nan_is_nan(isa):
    scores = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    scores[0, 650], scores[1, 3] = torch.nan, torch.nan
    tokens = sample_tokens(scores, torch.arange(3), torch.arange(3))
    assert tokens[:2].tolist() == [650, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@DTYPES
def test_rows_that_share_a_head_choose_as_they_do_alone(isa, threads, dtype, temperature):
    hidden, weight, lower, lower_weight = operands(5, 1100, 40, dtype)
    other, alphas = weight.flip(0), torch.tensor([9.0, 9.0, 0.1, 1e-3, 0.5])
    groups = [
        RowGroup(2),
        RowGroup(2, lower[:2], lower_weight),
        RowGroup(1, lower[2:3], other),
    ]
    how = choices(5, temperature)
    tokens, log_probs = shared_head_tokens(hidden, weight, None, groups, alphas, None, *how)
    for rows, group in zip((slice(0, 2), slice(2, 4), slice(4, 5)), groups, strict=True):
        own = hidden[rows], weight
        draws = [x[rows] for x in how]
        alone = (
            head_tokens(*own, None, *draws)
            if group.lower_hidden is None
            else contrast_tokens(*own, *group[1:3], alphas[rows], *draws)
        )
        assert torch.equal(tokens[rows], alone[0])
        assert torch.equal(log_probs[rows], alone[1])


def test_the_plausible_set_is_as_large_as_asked(isa):
    args, alphas = operands(6, 3001, 33), torch.full((6,), 0.1)
    least = torch.tensor([1, 0, 5, 200, 3001, 4000])
    upper, upper_weight, lower, lower_weight = (x.double() for x in args)
    expected = ops.contrast_logits.reference(
        upper @ upper_weight.T, lower @ lower_weight.T, alphas, least
    )
    actual = contrast_heads(*args, alphas, least)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)
    args[0][2:4, 0] = torch.nan
    assert contrast_heads(*args, alphas, least).isnan().any(1).tolist() == [0, 0, 1, 1, 0, 0]
