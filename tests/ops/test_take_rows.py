"""Rows of tables are bit by bit those of PyTorch."""

import pytest
import torch

from multiexit_engine.ops import take_rows
from tests.ops.backends import all_backends, implementation_or_skip


@all_backends(take_rows)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "width"), [(0, 3), (1, 1), (7, 33), (100, 63)])
def test_are_those_asked_for(backend, dtype, count, width):
    function = implementation_or_skip(take_rows, backend)
    generator = torch.Generator().manual_seed(count)
    table = torch.randn(31, width, generator=generator).to(dtype)
    rows = torch.randint(0, 31, (count,), generator=generator)
    assert torch.equal(function(table, rows), table[rows])


@all_backends(take_rows)
@pytest.mark.parametrize("row", [-1, 31])
def test_a_row_that_is_not_there_is_an_error(backend, row):
    function = implementation_or_skip(take_rows, backend)
    with pytest.raises(IndexError):
        function(torch.zeros(31, 4), torch.tensor([3, row]))


def test_columns_of_a_wider_table_are_taken_too():
    wide = torch.randn(5, 8)
    rows = torch.tensor([4, 0])
    assert torch.equal(take_rows(wide[:, 2:5], rows), wide[[4, 0], 2:5])
