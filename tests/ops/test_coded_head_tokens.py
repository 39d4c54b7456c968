"""Tokens by codes are those of exact logits, whatever the rows and heads."""

import pytest
import torch

from multiexit_engine.ops import (
    code_head,
    code_hidden,
    coded_head_tokens,
    head_logits,
    logit_errors,
)
from multiexit_engine.ops.coded_heads import MOST_NEAR
from tests.ops.backends import all_backends, implementation_or_skip
from tests.ops.test_coded_head_statistics import SHAPES, operands


def tokens_of(function, hidden, weight, bias):
    head, states = code_head(weight), code_hidden(hidden)
    return function(hidden, weight, states, head, logit_errors(states, head, bias), bias)


@all_backends(coded_head_tokens)
@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 1.0, 30.0])
def test_equal_those_of_exact_logits(backend, rows, vocab, size, has_bias, spread):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, bias = operands(rows, vocab, size, spread)
    bias = bias if has_bias else None
    wanted = head_logits(hidden, weight, bias).argmax(1)
    found = tokens_of(function, hidden, weight, bias)
    if not has_bias and spread < 0.1:  # all tokens are near
        found = torch.where(found < 0, wanted, found)
    assert found.tolist() == wanted.tolist()
    reference = tokens_of(coded_head_tokens.reference, hidden, weight, bias)
    assert reference.tolist() == wanted.tolist()


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
def test_a_token_that_cannot_be_is_none(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    hidden, weight, bias = operands(4, 700, 33)
    bias[5:650] = -torch.inf
    wanted = head_logits(hidden, weight, bias).argmax(1)
    assert tokens_of(function, hidden, weight, bias).tolist() == wanted.tolist()


@all_backends(coded_head_tokens)
def test_the_exact_logits_decide_between_the_nearest(backend):
    function = implementation_or_skip(coded_head_tokens, backend)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator)
    direction = hidden.mean(0)
    weight = direction + 1e-3 * torch.randn(MOST_NEAR, 64, generator=generator)
    wanted = head_logits(hidden, weight, None).argmax(1)
    assert len(wanted.unique()) > 5
    assert tokens_of(function, hidden, weight, None).tolist() == wanted.tolist()


def test_columns_that_stick_out_of_the_states_widen_the_bounds_beyond_use():
    generator = torch.Generator().manual_seed(0)
    weight = 0.13 * torch.randn(8192, 768, generator=generator)
    hidden = torch.randn(16, 768, generator=generator)
    uneven = hidden.clone()
    uneven[:, :3] *= 10
    assert share_near(hidden, weight) < 0.01
    assert share_near(uneven, weight) > 0.05


def share_near(hidden, weight):
    """Share of the tokens that codes cannot tell from the best one."""
    errors = logit_errors(code_hidden(hidden), code_head(weight), None)
    logits = head_logits(hidden, weight, None)
    return (logits >= logits.amax(1, keepdim=True) - 2 * errors[:, None]).double().mean()
