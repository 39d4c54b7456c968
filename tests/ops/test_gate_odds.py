"""Log-odds of passing a test are those of the logistic distribution that the network gives."""

import pytest
import torch

from multiexit_engine.ops import gate_odds
from tests.ops.backends import all_backends, implementation_or_skip


def operands(rows, hidden, units):
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, hidden), (units, hidden), (units,), (4, units), (4,), (rows,)
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    parts[1] *= hidden**-0.5
    parts[3] *= units**-0.5
    return *parts, torch.arange(rows) % 2 == 1


def truth(normed, up, up_bias, down, down_bias, thresholds, by_entropy):
    wide = [part.double() for part in (normed, up, up_bias, down, down_bias, thresholds)]
    inner = (wide[0] @ wide[1].T + wide[2]).relu()
    first, second, first_scale, second_scale = (inner @ wide[3].T + wide[4]).T
    at_least = (first - wide[5]) / first_scale.exp()
    return torch.where(by_entropy, (wide[5] - second) / second_scale.exp(), at_least)


@all_backends(gate_odds)
@pytest.mark.parametrize(("rows", "hidden", "units"), [(1, 5, 1), (17, 48, 7), (70, 100, 64)])
def test_equal_the_distribution(backend, rows, hidden, units):
    own = operands(rows, hidden, units)
    found = implementation_or_skip(gate_odds, backend)(*own)
    torch.testing.assert_close(found.double(), truth(*own), atol=1e-4, rtol=1e-4)


@all_backends(gate_odds)
def test_no_number_gives_none_and_infinite_thresholds_are_certain(backend):
    own = list(operands(6, 33, 8))
    own[0][2, 5] = torch.nan
    own[5][:] = torch.tensor([torch.inf, torch.inf, 0.0, -torch.inf, -torch.inf, 0.0])
    found = implementation_or_skip(gate_odds, backend)(*own)
    assert found[[0, 1, 3, 4]].tolist() == [-torch.inf, torch.inf, -torch.inf, torch.inf]
    assert found.isnan().tolist() == [False, False, True, False, False, False]


def test_a_row_does_not_depend_on_others_or_threads():
    own = operands(70, 100, 64)
    whole = gate_odds(*own)
    for row in (0, 33, 69):
        rows = slice(row, row + 1)
        alone = gate_odds(own[0][rows], *own[1:5], own[5][rows], own[6][rows])
        assert torch.equal(alone, whole[rows])
