"""Rough logits are never further from the exact ones than they say."""

import math

import pytest
import torch

from multiexit_engine.decoding.certainty import certain_rows
from multiexit_engine.decoding.gates import reading_of
from multiexit_engine.ops import (
    code_head,
    code_states,
    coded_head_statistics,
    head_statistics,
    logit_bounds,
    logit_errors,
)

SHAPES = pytest.mark.parametrize(
    ("rows", "vocab", "size"), [(1, 1, 4), (2, 17, 5), (3, 513, 33), (13, 1031, 48), (25, 600, 64)]
)


def operands(rows, vocab, size, spread=3.0):
    """Some rows of such a spread of logits that exits near every threshold occur."""
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, size, generator=generator) * spread
    weight = torch.randn(vocab, size, generator=generator) * size**-0.5
    return hidden, weight, torch.randn(vocab, generator=generator)


def coded(hidden, weight, bias, op=coded_head_statistics, num_terms=1):
    """Statistics of the rough logits, and how far off these may be."""
    head = code_head(weight)
    states = code_states(hidden, head, num_terms)
    arrays = head.codes, head.starts, head.scales, head.vocab
    return op(states.codes, states.scales, *arrays, bias), logit_errors(states, head, bias)


def decoded(head, states):
    """[rows, vocab] float64 logits that the codes stand for."""
    rows = head.codes.transpose(1, 2).flatten(2).flatten(0, 1).double() * head.scales[:, None]
    hidden = ((states.codes.double() - 128) * states.scales[..., None].double()).sum(1)
    return hidden @ rows[: head.vocab].T


@SHAPES
@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_no_logit_is_further_off_than_its_bound(rows, vocab, size, num_terms, outlier):
    hidden, weight, bias = operands(rows, vocab, size)
    hidden[0] *= 1e3
    hidden[:, 0] *= outlier
    weight[:, 1] = outlier * weight[:, 1] + 1
    head = code_head(weight)
    states = code_states(hidden, head, num_terms)
    bounds = logit_bounds(states, head, bias)
    missing = (decoded(head, states) - hidden.double() @ weight.double().T)[:, :vocab]
    # all logits of a row lack one number: what is off is the difference of any two
    reach = bounds.reaches.double()[:, None] * head.errors[:vocab].double() + bounds.slacks[:, None]
    for token in (0, vocab // 2, vocab - 1):
        off = (missing - missing[:, token : token + 1]).abs()
        assert (off <= reach + reach[:, token : token + 1]).all()
    assert (reach.amax(1) <= logit_errors(states, head, bias) * (1 + 1e-12)).all()


@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_statistics_are_those_of_the_codes(rows, vocab, size, has_bias, num_terms):
    hidden, weight, bias = operands(rows, vocab, size)
    bias = bias if has_bias else None
    head = code_head(weight)
    logits = decoded(head, code_states(hidden, head, num_terms))
    wanted = (logits if bias is None else logits + bias).log_softmax(-1)
    for op in (coded_head_statistics.reference, coded_head_statistics):
        found, _ = coded(hidden, weight, bias, op, num_terms)
        assert found.tokens.tolist() == wanted.argmax(-1).tolist()
        torch.testing.assert_close(found.log_probs.double(), wanted.amax(-1), atol=1e-4, rtol=1e-5)
        entropy = -(wanted.exp() * wanted).sum(-1)
        torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-4, rtol=1e-4)


@SHAPES
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_a_certain_row_is_what_the_exact_logits_say(rows, vocab, size, measure, spread, num_terms):
    hidden, weight, bias = operands(rows, vocab, size, spread)
    exact = head_statistics(hidden, weight, bias)
    rough, errors = coded(hidden, weight, bias, num_terms=num_terms)
    own = reading_of([measure] * rows, exact).values
    # the hardest thresholds are the values themselves
    for threshold in [0.0, 0.3, 0.9, 1.0, *own.tolist(), *(own * 1.00001).tolist()]:
        sure, unsure = certain_rows(rough, errors, [measure] * rows, [threshold] * rows)
        wanted = own <= threshold if measure == "entropy" else own >= threshold
        assert not (sure & ~wanted).any() and not (unsure & wanted).any()


def test_rows_far_from_the_threshold_are_certain():
    hidden, weight, bias = operands(8, 1031, 48, 0.3)
    rough, errors = coded(hidden, weight, bias)
    assert certain_rows(rough, errors, ["max_prob"] * 8, [0.9] * 8)[1].all()


def test_two_terms_leave_fewer_rows_open():
    hidden, weight, bias = operands(200, 1031, 48, 3.0)
    num_known = []
    for num_terms in (1, 2):
        rough, errors = coded(hidden, weight, bias, num_terms=num_terms)
        sure, unsure = certain_rows(rough, errors, ["max_prob"] * 200, [0.5] * 200)
        num_known.append(int((sure | unsure).sum()))
    assert num_known[0] < num_known[1] < 200


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_never_certain(broken):
    hidden, weight, bias = operands(3, 100, 16)
    asked = ["max_prob"] * 3, [0.0] * 3
    bad = hidden.clone()
    bad[1, 3] = broken
    sure, unsure = certain_rows(*coded(bad, weight, bias), *asked)
    assert not sure[1] and not unsure[1] and sure[0] and sure[2]
    weight[7, 2] = broken
    for verdict in certain_rows(*coded(hidden, weight, bias), *asked):
        assert not verdict.any()


def test_a_token_that_cannot_be_counts_for_nothing():
    hidden, weight, bias = operands(3, 100, 16)
    bias[5:50] = -torch.inf
    kept = torch.tensor([*range(5), *range(50, 100)])
    rough, errors = coded(hidden, weight, bias)
    head = code_head(weight)
    logits = decoded(head, code_states(hidden, head)) + bias
    wanted = head_statistics(logits[:, kept].float(), torch.eye(55)).entropy
    torch.testing.assert_close(rough.entropy, wanted, atol=1e-5, rtol=1e-5)
    assert errors.isfinite().all()
