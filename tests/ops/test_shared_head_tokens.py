import pytest
import torch

from multiexit_engine.ops import contrast_tokens, head_tokens, shared_head_tokens
from multiexit_engine.ops.tokens import RowGroup
from tests.kernels.hidden_states import two_exits
from tests.ops.backends import all_backends, device_for, implementation_or_skip


def shared_case(temperature):
    """Six rows of one head: two alone, three against one lower head, one against another."""
    case = two_exits(6, 100, 24, temperature=temperature)
    plain, first, second = (torch.tensor(rows) for rows in ([0, 4], [1, 3, 5], [2]))
    other = torch.randn(100, 24, generator=torch.Generator().manual_seed(3))
    alpha = torch.tensor([0.1, 1e-3, 0.5, 0.01, 0.2, 0.05])
    groups = [
        RowGroup(plain),
        RowGroup(first, case.lower_hidden[first], case.lower_weight, alpha[first]),
        RowGroup(second, case.lower_hidden[second], other, alpha[second]),
    ]
    return case, groups


def one_by_one(case, groups):
    tokens, log_probs = torch.empty(6, dtype=torch.int64), torch.empty(6)
    for rows, *lower in groups:
        draws = case.temperature[rows], case.seeds[rows], case.positions[rows]
        own = case.upper_hidden[rows], case.upper_weight
        if lower[0] is None:
            tokens[rows], log_probs[rows] = head_tokens.reference(*own, None, *draws)
        else:
            tokens[rows], log_probs[rows] = contrast_tokens.reference(*own, *lower, *draws)
    return tokens, log_probs


@all_backends(shared_head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_gives_what_the_groups_ops_give(backend, temperature):
    case, groups = shared_case(temperature)
    device = device_for(shared_head_tokens, backend)
    expected, expected_log_probs = one_by_one(case, groups)
    draws = case.temperature, case.seeds, case.positions
    args = [x.to(device) for x in (case.upper_hidden, case.upper_weight)]
    moved = [RowGroup(*(x if x is None else x.to(device) for x in group)) for group in groups]
    for function in (
        shared_head_tokens.reference,
        implementation_or_skip(shared_head_tokens, backend),
    ):
        tokens, log_probs = function(*args, moved, *(x.to(device) for x in draws))
        assert tokens.tolist() == expected.tolist()
        torch.testing.assert_close(log_probs.cpu(), expected_log_probs, atol=2e-5, rtol=0)


@all_backends(shared_head_tokens)
def test_the_plausible_tokens_of_contrasted_rows_are_counted(backend):
    case, groups = shared_case(0.0)
    expected = torch.zeros(6, dtype=torch.int32)
    for rows, *lower in groups[1:]:
        counts = torch.empty(len(rows), dtype=torch.int32)
        draws = case.temperature[rows], case.seeds[rows], case.positions[rows]
        own = case.upper_hidden[rows], case.upper_weight
        contrast_tokens.reference(*own, *lower, *draws, counts)
        expected[rows] = counts
    for function in (
        shared_head_tokens.reference,
        implementation_or_skip(shared_head_tokens, backend),
    ):
        actual = torch.full((6,), -1, dtype=torch.int32)
        draws = case.temperature, case.seeds, case.positions
        function(case.upper_hidden, case.upper_weight, groups, *draws, actual)
        assert actual.tolist() == expected.tolist()
