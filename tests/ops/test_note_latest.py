"""Tokens that an earlier step chose, remembered for the rows that go on with them."""

import pytest
import torch

from multiexit_engine.ops import note_latest
from tests.ops.backends import all_backends, device_for, implementation_or_skip

TOKENS = torch.tensor([50, 7, -3, 999])


def noted(function, chosen_by, device):
    latest = torch.full((len(chosen_by),), 12345, device=device)
    places = torch.tensor(chosen_by, device=device)
    function(latest, TOKENS.to(device), places)
    return latest.tolist()


@pytest.mark.parametrize("count", [1, 1031])
def test_reference_takes_the_tokens_that_are_named(count):
    chosen_by = [3, -1, 0, 0, -7] * count
    assert noted(note_latest.reference, chosen_by, "cpu") == [999, -1, 50, 50, -1] * count


@all_backends(note_latest)
@pytest.mark.parametrize("count", [1, 1031])
def test_backend_takes_the_tokens_that_are_named(backend, count):
    function = implementation_or_skip(note_latest, backend)
    found = noted(function, [3, -1, 0, 0, -7] * count, device_for(note_latest, backend))
    assert found == [999, -1, 50, 50, -1] * count
