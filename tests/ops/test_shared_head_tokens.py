import pytest
import torch

from multiexit_engine.ops import contrast_tokens, head_tokens, shared_head_tokens
from multiexit_engine.ops.contrast import contrast_logits
from multiexit_engine.ops.tokens import RowGroup
from tests.kernels.hidden_states import assert_chosen, two_exits
from tests.ops.backends import all_backends, device_for, implementation_or_skip

SPANS = slice(0, 2), slice(2, 5), slice(5, 6)
ALPHA = torch.tensor([7.0, 7.0, 0.1, 1e-3, 0.5, 0.01])


def shared_case(temperature):
    """Six rows of one head: two alone, three against one lower head, one against another."""
    case = two_exits(6, 100, 24, temperature=temperature)
    other = torch.randn(100, 24, generator=torch.Generator().manual_seed(3))
    groups = [
        RowGroup(2),
        RowGroup(3, case.lower_hidden[2:5], case.lower_weight),
        RowGroup(1, case.lower_hidden[5:], other),
    ]
    return case, groups


def on(device, *parts):
    return [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]


def run(function, device, case, groups, *, bias=None, least=None, counts=None):
    """Results on the host; a bias that a group names is the shared head's own."""
    shared = None if bias is None else bias.to(device)
    moved = [
        RowGroup(*on(device, *group[:3]), None if group.lower_bias is None else shared)
        for group in groups
    ]
    own = on(device, case.upper_hidden, case.upper_weight)
    rest = on(device, ALPHA, least, case.temperature, case.seeds, case.positions, counts)
    return [part.cpu() for part in function(*own, shared, moved, *rest)]


def one_by_one(case, groups):
    tokens, log_probs = torch.empty(6, dtype=torch.int64), torch.empty(6)
    for rows, group in zip(SPANS, groups, strict=True):
        draws = case.temperature[rows], case.seeds[rows], case.positions[rows]
        own = case.upper_hidden[rows], case.upper_weight
        if group.lower_hidden is None:
            tokens[rows], log_probs[rows] = head_tokens.reference(*own, None, *draws)
        else:
            found = contrast_tokens.reference(*own, *group[1:3], ALPHA[rows], *draws)
            tokens[rows], log_probs[rows] = found
    return tokens, log_probs


def exact(case, groups, bias, least):
    """[rows, vocab] float64 log-probabilities."""
    parts = []
    for rows, group in zip(SPANS, groups, strict=True):
        upper = case.upper_hidden[rows].double() @ case.upper_weight.double().T
        upper = upper if bias is None else upper + bias.double()
        if group.lower_hidden is None:
            parts.append(upper.log_softmax(-1))
            continue
        lower = group.lower_hidden.double() @ group.lower_weight.double().T
        lower = lower if group.lower_bias is None else lower + group.lower_bias.double()
        own = None if least is None else least[rows]
        parts.append(contrast_logits.reference(upper, lower, ALPHA[rows], own))
    return torch.cat(parts)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_gives_what_the_groups_ops_give(backend, temperature):
    case, groups = shared_case(temperature)
    device = device_for(shared_head_tokens, backend)
    expected, expected_log_probs = one_by_one(case, groups)
    for function in (
        shared_head_tokens.reference,
        implementation_or_skip(shared_head_tokens, backend),
    ):
        tokens, log_probs = run(function, device, case, groups)
        assert tokens.tolist() == expected.tolist()
        torch.testing.assert_close(log_probs, expected_log_probs, atol=2e-5, rtol=0)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_biases_of_both_heads_count(backend, temperature):
    case, groups = shared_case(temperature)
    bias = torch.linspace(-9, 9, 100)
    groups[1] = groups[1]._replace(lower_bias=bias)
    function = implementation_or_skip(shared_head_tokens, backend)
    found = run(function, device_for(shared_head_tokens, backend), case, groups, bias=bias)
    assert_chosen(found, exact(case, groups, bias, None), case)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_plausible_sets_are_as_large_as_asked(backend, temperature):
    case, groups = shared_case(temperature)
    least = torch.tensor([1, 1, 1, 7, 0, 60])
    function = implementation_or_skip(shared_head_tokens, backend)
    found = run(function, device_for(shared_head_tokens, backend), case, groups, least=least)
    assert_chosen(found, exact(case, groups, None, least), case)


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("least", [None, torch.tensor([1, 1, 1, 7, 0, 60])], ids=str)
def test_the_plausible_tokens_of_contrasted_rows_are_counted(backend, least):
    case, groups = shared_case(0.0)
    expected = torch.zeros(6, dtype=torch.int32)
    for rows in SPANS[1:]:
        upper = case.upper_hidden[rows] @ case.upper_weight.T
        own = None if least is None else least[rows]
        contrast_logits.reference(upper, upper, ALPHA[rows], own, expected[rows])
    device = device_for(shared_head_tokens, backend)
    for function in (
        shared_head_tokens.reference,
        implementation_or_skip(shared_head_tokens, backend),
    ):
        counts = torch.full((6,), -1, dtype=torch.int32, device=device)
        run(function, device, case, groups, least=least, counts=counts)
        assert counts.tolist() == expected.tolist()
