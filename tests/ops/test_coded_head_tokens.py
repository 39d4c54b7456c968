"""Tokens by codes are those of exact logits, whatever the rows and heads."""

import pytest
import torch

from multiexit_engine.ops import (
    code_head,
    code_states,
    coded_head_tokens,
    head_logits,
    head_tokens,
    logit_bounds,
    shared_head_tokens,
)
from multiexit_engine.ops.coded_tokens import MOST_NEAR
from multiexit_engine.ops.tokens import RowGroup
from tests.ops.backends import all_backends, implementation_or_skip
from tests.ops.test_rough_head_sums import operands

SHAPES = pytest.mark.parametrize(
    ("rows", "vocab", "size"), [(1, 1, 4), (2, 17, 5), (3, 513, 33), (13, 1031, 48), (25, 600, 64)]
)


def tokens_of(
    function,
    hidden,
    weight,
    bias=None,
    *,
    groups=None,
    alpha=0.1,
    temperature=0.0,
    counts=None,
    num_terms=2,
):
    head = code_head(weight)
    states = code_states(hidden, head, num_terms)
    rows = choice(hidden, groups, alpha, temperature)
    bounds = logit_bounds(states, head, bias)
    return function(hidden, weight, bias, *rows, states, head, bounds, counts)


def choice(hidden, groups, alpha, temperature):
    rows = len(hidden)
    draws = torch.arange(rows) * 7 + 1, torch.arange(rows) + 3
    heats = torch.as_tensor(temperature).expand(rows)
    return groups or [RowGroup(rows)], torch.as_tensor(alpha).expand(rows), heats, *draws


def exact_tokens(hidden, weight, bias, groups, alpha, counts=None, temperature=0.0):
    parts, heads, heats, *draws = choice(hidden, groups, alpha, temperature)
    rows = hidden, weight, bias, parts, heads, None, heats, *draws, counts
    return shared_head_tokens(*rows)[0]


@all_backends(coded_head_tokens)
@SHAPES
@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 1.0, 30.0])
def test_equal_those_of_exact_logits(backend, rows, vocab, size, has_bias, spread, num_terms):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, bias = operands(rows, vocab, size, spread)
    bias = bias if has_bias else None
    wanted = head_logits(hidden, weight, bias).argmax(1)
    found = tokens_of(function, hidden, weight, bias, num_terms=num_terms)
    if not has_bias and spread < 0.1:  # all tokens are near
        found = torch.where(found < 0, wanted, found)
    assert found.tolist() == wanted.tolist()
    reference = tokens_of(coded_head_tokens.reference, hidden, weight, bias, num_terms=num_terms)
    assert reference.tolist() == wanted.tolist()


@all_backends(coded_head_tokens)
@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("heat", [0.01, 0.7, 1.0, 5.0])
def test_sampled_tokens_are_those_of_exact_logits(backend, rows, vocab, size, has_bias, heat):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, bias = operands(rows, vocab, size, 3.0)
    bias = bias if has_bias else None
    temperature = torch.full((rows,), heat)
    temperature[::3] = 0.0  # greedy beside them
    _, _, heats, *draws = choice(hidden, None, 0.1, temperature)
    wanted, _ = head_tokens(hidden, weight, bias, heats, *draws)
    for op in (function, coded_head_tokens.reference):
        found = tokens_of(op, hidden, weight, bias, temperature=temperature)
        assert found.tolist() == wanted.tolist()


def two_heads(rows, vocab, size, spread):
    hidden, weight, bias = operands(rows, vocab, size, spread)
    generator = torch.Generator().manual_seed(1)
    lower = weight + 0.3 * torch.randn(vocab, size, generator=generator) * size**-0.5
    lower_hidden = hidden + 0.3 * torch.randn(rows, size, generator=generator)
    alone = rows // 3
    groups = [RowGroup(alone), RowGroup(rows - alone, lower_hidden[alone:], lower)]
    return hidden, weight, bias, groups if alone else groups[1:]


@all_backends(coded_head_tokens)
@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("heat", [0.0, 0.3, 1.0, 4.0])
def test_contrasts_are_those_of_exact_logits(
    backend, rows, vocab, size, has_bias, spread, alpha, heat
):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, bias, groups = two_heads(rows, vocab, size, spread)
    bias = bias if has_bias else None
    heats = torch.full((rows,), heat)
    heats[::3] = 0.0
    counts, found_counts = torch.empty(2, rows, dtype=torch.int32)
    wanted = exact_tokens(hidden, weight, bias, groups, alpha, counts, heats)
    for op in (function, coded_head_tokens.reference):
        found_counts.fill_(-7)
        more = {"groups": groups, "alpha": alpha, "counts": found_counts, "temperature": heats}
        assert tokens_of(op, hidden, weight, bias, **more).tolist() == wanted.tolist()
        assert found_counts.tolist() == counts.tolist()


@all_backends(coded_head_tokens)
@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_so_are_those_of_heads_in_half_precision(backend, rows, vocab, size, dtype, heat):
    function = implementation_or_skip(coded_head_tokens, backend)
    *tensors, groups = two_heads(rows, vocab, size, 3.0)
    hidden, weight, bias = (each.to(dtype) for each in tensors)
    *alone, (count, lower_hidden, lower, _) = groups
    groups = [*alone, RowGroup(count, lower_hidden.to(dtype), lower.to(dtype))]
    heats = torch.full((rows,), heat)
    for own in (groups, [RowGroup(rows)]):
        wanted = exact_tokens(hidden, weight, bias, own, 0.1, None, heats)
        found = tokens_of(function, hidden, weight, bias, groups=own, temperature=heats)
        assert found.tolist() == wanted.tolist()


@all_backends(coded_head_tokens)
def test_equal_ratios_are_left_open_or_give_the_lowest_token(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, _ = operands(6, 700, 33)
    for row in range(6):
        weight[[40 + row, 300 + row, 650 + row]] = 2 * hidden[row]
    groups = [RowGroup(6, hidden.clone(), weight.clone())]
    wanted = exact_tokens(hidden, weight, None, groups, 0.1)
    assert wanted.tolist() == [40, 41, 42, 43, 44, 45]
    found = tokens_of(function, hidden, weight, groups=groups)
    assert torch.equal(torch.where(found < 0, wanted, found), wanted)


@all_backends(coded_head_tokens)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_lower_logits_that_are_not_finite_decide_nothing_or_as_they_should(backend, broken):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, _, groups = two_heads(4, 700, 33, 3.0)
    alpha = 0.01
    for row in range(4):
        lower = groups[-1].lower_weight.clone()
        lower[int((hidden @ weight.T)[row].argmax()), 5] = broken
        own = [*groups[:-1], groups[-1]._replace(lower_weight=lower)]
        wanted = exact_tokens(hidden, weight, None, own, alpha)
        found = tokens_of(function, hidden, weight, groups=own, alpha=alpha)
        assert torch.equal(torch.where(found < 0, wanted, found), wanted)
        assert (found >= 0).sum() >= 3


@all_backends(coded_head_tokens)
def test_contrasts_that_take_every_token_are_left_open_alone(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, _, groups = two_heads(6, 5000, 33, 3.0)
    alpha = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.1, 0.1])
    found = tokens_of(function, hidden, weight, groups=groups, alpha=alpha)
    wanted = exact_tokens(hidden, weight, None, groups, alpha)
    assert found[3] in (-1, wanted[3])
    kept = [0, 1, 2, 4, 5]
    assert found[kept].tolist() == wanted[kept].tolist()


@all_backends(coded_head_tokens)
def test_more_near_tokens_than_there_is_room_for(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, _ = operands(130, 5000, 16)
    weight[:] = weight[0] * (1 + 1e-4 * torch.randn(5000, 1))
    # of equals the lowest
    weight[[7, 4000]] = hidden[3] * 9
    wanted = head_logits(hidden, weight, None).argmax(1)
    assert wanted[3] == 7
    found = tokens_of(function, hidden, weight, None)
    assert found[3] == 7
    assert torch.equal(torch.where(found < 0, wanted, found), wanted)


@all_backends(coded_head_tokens)
def test_a_row_without_a_bound_is_left_open(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, _ = operands(4, 700, 33)
    wanted = head_logits(hidden, weight, None).argmax(1)
    hidden[2, 5] = torch.nan
    wanted[2] = -1
    for op in (function, coded_head_tokens.reference):
        assert tokens_of(op, hidden, weight, None).tolist() == wanted.tolist()


@all_backends(coded_head_tokens)
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_a_token_that_cannot_be_is_none(backend, heat):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, bias = operands(4, 700, 33)
    bias[5:650] = -torch.inf
    _, _, heats, *draws = choice(hidden, None, 0.1, heat)
    wanted, _ = head_tokens(hidden, weight, bias, heats, *draws)
    assert tokens_of(function, hidden, weight, bias, temperature=heat).tolist() == wanted.tolist()


@all_backends(coded_head_tokens)
def test_the_exact_logits_decide_between_the_nearest(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator)
    direction = hidden.mean(0)
    weight = direction + 1e-5 * torch.randn(MOST_NEAR, 64, generator=generator)
    wanted = head_logits(hidden, weight, None).argmax(1)
    assert len(wanted.unique()) > 5
    assert tokens_of(function, hidden, weight, None).tolist() == wanted.tolist()


@all_backends(coded_head_tokens)
def test_a_row_does_not_depend_on_the_others(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, _, groups = two_heads(140, 700, 33, 0.3)
    lower = groups[1]
    more = {"alpha": 1e-2}
    whole = tokens_of(function, hidden, weight, groups=groups, **more)
    for row in (47, 90, 139):
        place = row - groups[0].num_rows
        own = [RowGroup(1, lower.lower_hidden[place : place + 1], lower.lower_weight)]
        alone = tokens_of(function, hidden[row : row + 1], weight, groups=own, **more)
        assert alone.tolist() == whole[row : row + 1].tolist()


@pytest.fixture(scope="module")
def states_and_head():
    generator = torch.Generator().manual_seed(0)
    weight = 0.13 * torch.randn(8192, 768, generator=generator)
    return torch.randn(16, 768, generator=generator), weight


@pytest.mark.parametrize("columns", ["none", "states", "head", "both", "mean"])
def test_columns_that_stick_out_hardly_widen_the_bounds(states_and_head, columns):
    """Three columns ten times as large, and a mean row as long as the others' spread.

    Of the codes of unscaled columns and one term 0.6 % of the tokens were near with even columns,
    5 % with uneven states, 99 % with other uneven columns of the head as well.
    """
    hidden, weight = (part.clone() for part in states_and_head)
    if columns in ("states", "both"):
        hidden[:, :3] *= 10
    if columns in ("head", "both"):
        weight[:, 4:7] *= 10
    if columns == "mean":
        weight += 0.13 * torch.randn(768, generator=torch.Generator().manual_seed(1))
    head = code_head(weight)
    states = code_states(hidden, head, num_terms=2)
    assert share_near(hidden, weight, head, states) < 0.0012


def share_near(hidden, weight, head, states):
    """Share of the tokens that codes cannot tell from the best one."""
    bounds = logit_bounds(states, head, None)
    logits = head_logits(hidden, weight, None)
    reach = bounds.reaches[:, None] * head.errors[: len(weight)] + bounds.slacks[:, None]
    least = (logits - reach).amax(1, keepdim=True)
    return (logits + reach >= least).double().mean()
