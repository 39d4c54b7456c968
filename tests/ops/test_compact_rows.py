"""Rows that go on, listed without waiting."""

import pytest
import torch

from multiexit_engine.ops import compact_rows
from tests.ops.backends import all_backends, device_for, implementation_or_skip

GENERATOR = torch.Generator().manual_seed(0)
MASKS = {
    "none": torch.zeros(63, dtype=torch.bool),
    "all": torch.ones(7, dtype=torch.bool),
    "one": torch.ones(1, dtype=torch.bool),
    "some of more than a block": torch.rand(2500, generator=GENERATOR) < 0.3,
    "the last": torch.arange(1025) == 1024,
}


def wanted(mask):
    """By a loop: the listed rows, and how many lie before each row."""
    rows, before = [], [0]
    for row, is_listed in enumerate(mask.tolist()):
        rows += [row] * is_listed
        before.append(len(rows))
    return rows, before


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_reference_equals_a_loop(mask):
    rows, before = wanted(mask)
    found = compact_rows.reference(mask)
    assert found.rows[: len(rows)].tolist() == rows
    assert found.index().tolist() == rows
    assert found.before.tolist() == before
    assert found.rows.dtype == found.before.dtype == torch.int32


@all_backends(compact_rows)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_backend_equals_a_loop(mask, backend):
    function = implementation_or_skip(compact_rows, backend)
    rows, before = wanted(mask)
    found = function(mask.to(device_for(compact_rows, backend)))
    assert found.rows[: len(rows)].tolist() == rows
    assert found.before.tolist() == before
    assert found.count.tolist() == [len(rows)]


@all_backends(compact_rows)
def test_columns_of_a_mask_are_read_where_they_lie(backend):
    function = implementation_or_skip(compact_rows, backend)
    masks = torch.tensor([[True, False], [False, True], [True, True]])
    found = function(masks.to(device_for(compact_rows, backend))[:, 1])
    assert found.before.tolist() == [0, 0, 1, 2]
