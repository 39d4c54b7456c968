"""Rough logits are never further from the exact ones than is said; neither is what they tell."""

import math

import pytest
import torch

from multiexit_engine.decoding.certainty import certain_rows, lone_best_tokens
from multiexit_engine.decoding.gates import reading_of
from multiexit_engine.ops import (
    code_head,
    code_states,
    finer_head,
    finer_spread,
    head_spread,
    head_statistics,
    logit_bounds,
    logit_errors,
    rough_head_sums,
)
from multiexit_engine.ops.rough_sums import MOST_NEAR

# those with more than 2048 tokens have some that are not near
SHAPES = pytest.mark.parametrize(
    ("rows", "vocab", "size"), [(1, 1, 4), (2, 17, 5), (3, 2113, 33), (13, 4031, 48), (25, 600, 64)]
)


def operands(rows, vocab, size, spread=3.0):
    """Some rows of such a spread of logits that exits near every threshold occur."""
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, size, generator=generator) * spread
    weight = torch.randn(vocab, size, generator=generator) * size**-0.5
    return hidden, weight, torch.randn(vocab, generator=generator)


def coded(hidden, weight, bias, op=rough_head_sums, num_terms=1, has_spread=True):
    """What codes say of rows, and how far that may be off; 3 terms stand for finer codes, too."""
    head = code_head(weight)
    if num_terms == 3:
        states, finer = code_states(hidden, head, 2), finer_head(weight, head)
        found = op(hidden, weight, bias, states, head, logit_bounds(states, finer, bias), finer)
        spread = finer_spread(head_spread(weight, head), finer)
        return found, logit_errors(states, finer, bias, spread)
    states = code_states(hidden, head, num_terms)
    spread = head_spread(weight, head) if has_spread else None
    found = op(hidden, weight, bias, states, head, logit_bounds(states, head, bias))
    return found, logit_errors(states, head, bias, spread)


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
    common = hidden.double() @ head.mean.double()
    exact = hidden.double() @ weight.double().T
    missing = (decoded(head, states) + common[:, None] - exact)[:, :vocab].abs()
    reach = bounds.reaches.double()[:, None] * head.errors[:vocab].double() + bounds.slacks[:, None]
    assert (missing <= reach).all()
    errors = logit_errors(states, head, bias, head_spread(weight, head))
    assert (reach.amax(1) <= errors.greatest * (1 + 1e-12)).all()
    assert (missing.norm(dim=1) <= errors.distances).all()
    assert (missing.norm(dim=1) <= logit_errors(states, head, bias).distances).all()


@SHAPES
def test_no_logit_is_further_off_the_finer_codes_than_their_bound(rows, vocab, size):
    hidden, weight, bias = operands(rows, vocab, size)
    weight[:, 1] = 30 * weight[:, 1] + 1
    head = code_head(weight)
    finer, states = finer_head(weight, head), code_states(hidden, head, 2)
    bounds = logit_bounds(states, finer, bias)
    common = hidden.double() @ head.mean.double()
    rough = decoded(head, states) + decoded(finer, states) + common[:, None]
    missing = (rough - hidden.double() @ weight.double().T).abs()
    reach = bounds.reaches.double()[:, None] * finer.errors[:vocab].double()
    assert (missing <= reach + bounds.slacks[:, None]).all()
    spread = finer_spread(head_spread(weight, head), finer)
    assert (missing.norm(dim=1) <= logit_errors(states, finer, bias, spread).distances).all()
    assert finer.errors[:vocab].max() <= head.errors[:vocab].max() / 50


def test_a_spread_is_little_more_than_the_greatest_singular_value():
    _, weight, _ = operands(1, 4031, 48)
    head = code_head(weight)
    coded_rows = decoded(head, code_states(torch.eye(48) / head.columns, head, 2)).T
    spread = head_spread(weight, head)
    missing = (weight - head.mean) / head.columns - coded_rows
    for found, truth in zip(spread, (missing, coded_rows), strict=True):
        exact = float(torch.linalg.matrix_norm(truth.double(), 2))
        assert exact * 0.999 <= found <= exact * 1.05


def test_of_heads_that_would_take_seconds_all_numbers_bound_the_spread(monkeypatch):
    _, weight, _ = operands(1, 600, 64)
    head = code_head(weight)
    near = head_spread(weight, head)
    monkeypatch.setattr("multiexit_engine.ops.rough_sums.MOST_PRODUCTS", 1)
    far = head_spread(weight, head)
    assert far.missing == float(head.errors.double().norm()) > near.missing
    assert far.codes > near.codes


@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_sums_are_those_of_codes_and_of_exact_logits_of_near_tokens(
    rows, vocab, size, has_bias, num_terms
):
    hidden, weight, bias = operands(rows, vocab, size)
    bias = bias if has_bias else None
    head = code_head(weight)
    states = code_states(hidden, head, num_terms)
    bounds, shift = logit_bounds(states, head, bias), 0.0 if bias is None else bias.double()
    reach = bounds.reaches[:, None] * head.errors[:vocab]
    rough = decoded(head, states) + (hidden.double() @ head.mean.double())[:, None] + shift
    exact = hidden.double() @ weight.double().T + shift
    for op in (rough_head_sums.reference, rough_head_sums):
        found, errors = coded(hidden, weight, bias, op, num_terms)
        assert found.tokens.tolist() == exact.argmax(1).tolist()
        torch.testing.assert_close(found.best, exact.amax(1), atol=1e-4, rtol=1e-5)
        near = rough + reach - found.best[:, None] > found.border[:, None] - 1e-4
        own = torch.where(near, exact, rough) - found.best[:, None]
        whole = found.near_sum + found.rest_sum
        torch.testing.assert_close(whole, own.exp().sum(1), atol=1e-4, rtol=1e-4)
        assert ((found.rest_sum == 0) == (found.border == -math.inf)).all()
        assert (found.border > -math.inf).all() == (vocab > MOST_NEAR)
        rest = own.masked_fill(near, -1e3)
        for squares, wanted in (
            (found.squares, (2 * rest).exp()),
            (found.square_drops, (2 * rest).exp() * rest),
            (found.squared_drops, (2 * rest).exp() * rest * rest),
            (found.rest_drops, rest.exp() * rest),
        ):
            torch.testing.assert_close(squares, wanted.sum(1), atol=1e-4, rtol=1e-4)


@SHAPES
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(
    ("num_terms", "has_spread", "dtype"),
    [
        (1, True, torch.float32),
        (2, True, torch.float32),
        (1, False, torch.float32),
        (1, True, torch.bfloat16),
        (2, True, torch.float16),
    ],
)
def test_a_certain_row_is_what_the_exact_logits_say(
    rows, vocab, size, measure, spread, num_terms, has_spread, dtype
):
    hidden, weight, bias = (each.to(dtype) for each in operands(rows, vocab, size, spread))
    exact = head_statistics(hidden, weight, bias)
    found = coded(hidden, weight, bias, num_terms=num_terms, has_spread=has_spread)
    own = reading_of([measure] * rows, exact).values
    # the hardest thresholds are the values themselves
    for threshold in [0.0, 0.3, 0.9, 1.0, *own.tolist(), *(own * 1.00001).tolist()]:
        sure, unsure = certain_rows(*found, [measure] * rows, [threshold] * rows)
        wanted = own <= threshold if measure == "entropy" else own >= threshold
        assert not (sure & ~wanted).any() and not (unsure & wanted).any()
    is_lone = lone_best_tokens(*found)
    assert torch.equal(found[0].tokens[is_lone], exact.tokens[is_lone])


def test_rows_far_from_the_threshold_are_certain():
    hidden, weight, bias = operands(8, 4031, 48, 0.3)
    found = coded(hidden, weight, bias)
    assert certain_rows(*found, ["max_prob"] * 8, [0.9] * 8)[1].all()


def test_two_terms_the_spread_and_finer_codes_leave_fewer_rows_open():
    hidden, weight, bias = operands(200, 4031, 48, 1.5)
    median = float(head_statistics(hidden, weight, bias).entropy.median())
    num_open = []
    for num_terms, has_spread in ((1, False), (1, True), (2, True), (3, True)):
        found = coded(hidden, weight, bias, num_terms=num_terms, has_spread=has_spread)
        sure, unsure = certain_rows(*found, ["entropy"] * 200, [median] * 200)
        num_open.append(int((~sure & ~unsure).sum()))
    assert num_open[0] > num_open[1] > num_open[2] > num_open[3]


@pytest.mark.parametrize("vocab", [100, 3000])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_never_certain(broken, vocab):
    hidden, weight, bias = operands(3, vocab, 16)
    asked = ["max_prob"] * 3, [0.0] * 3
    bad = hidden.clone()
    bad[1, 3] = broken
    found = coded(bad, weight, bias)
    sure, unsure = certain_rows(*found, *asked)
    assert not sure[1] and not unsure[1] and sure[0] and sure[2]
    assert not lone_best_tokens(*found)[1]
    weight[7, 2] = broken
    found = coded(hidden, weight, bias)
    for verdict in (*certain_rows(*found, *asked), lone_best_tokens(*found)):
        assert not verdict.any()


def test_a_token_that_cannot_be_counts_for_nothing():
    hidden, weight, bias = operands(3, 6000, 16)
    bias[5:3500] = -torch.inf
    kept = torch.tensor([*range(5), *range(3500, 6000)])
    found, errors = coded(hidden, weight, bias)
    less, _ = coded(hidden, weight[kept], bias[kept])
    whole, wanted = found.near_sum + found.rest_sum, less.near_sum + less.rest_sum
    torch.testing.assert_close(whole, wanted, atol=1e-3, rtol=1e-2)
    assert all(part.isfinite().all() for part in errors)
    assert all(part.isfinite().all() for part in found)


def test_equals_of_which_too_many_are_near_are_left_open():
    hidden, weight, _ = operands(3, 4000, 16)
    weight[:] = weight[0]
    for op in (rough_head_sums.reference, rough_head_sums):
        found = coded(hidden, weight, None, op)
        assert found[0].best.isnan().all()
        sure, unsure = certain_rows(*found, ["entropy"] * 3, [20.0] * 3)
        assert not sure.any() and not unsure.any()


def test_the_first_tokens_of_a_head_may_be_asked_alone():
    hidden, weight, bias = operands(5, 4031, 48)
    head = code_head(weight[:2500])
    states = code_states(hidden, head)
    bounds = logit_bounds(states, head, bias[:2500])
    found = [
        rough_head_sums(hidden, own, bias[:2500], states, head, bounds)
        for own in (weight, weight[:2500])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
