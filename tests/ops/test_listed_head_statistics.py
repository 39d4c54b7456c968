"""Statistics of listed rows: those of ``head_statistics``, and nothing of other rows."""

import math

import pytest
import torch

from multiexit_engine.ops import compact_rows, head_statistics, listed_head_statistics
from tests.ops.backends import all_backends, device_for, implementation_or_skip

SHAPES = pytest.mark.parametrize("shape", [(3, 100, 40), (90, 63, 64)], ids=str)


def operands(shape, share=0.4):
    """NaN in every row that is not listed."""
    rows, vocab, width = shape
    generator = torch.Generator().manual_seed(2)
    is_listed = torch.rand(rows, generator=generator) < share
    is_listed[-1] = True
    hidden = torch.randn(rows, width, generator=generator)
    hidden[~is_listed] = math.nan
    weight = torch.randn(vocab, width, generator=generator)
    return hidden, weight, torch.randn(vocab, generator=generator), is_listed


@all_backends(listed_head_statistics)
@SHAPES
def test_backend_equals_the_statistics_of_the_rows_alone(shape, backend):
    function = implementation_or_skip(listed_head_statistics, backend)
    hidden, weight, bias, is_listed = operands(shape)
    truth = head_statistics.reference(hidden[is_listed].double(), weight.double(), bias.double())
    device = device_for(listed_head_statistics, backend)
    rows = compact_rows.implementation(backend)(is_listed.to(device))
    found = function(hidden.to(device), weight.to(device), bias.to(device), rows)
    for own, wanted in zip(found, truth, strict=True):
        torch.testing.assert_close(
            own.cpu()[is_listed].double(), wanted.double(), atol=2e-5, rtol=2e-5
        )


@SHAPES
def test_reference_equals_the_statistics_of_the_rows_alone(shape):
    hidden, weight, bias, is_listed = operands(shape)
    rows = compact_rows.reference(is_listed)
    found = listed_head_statistics.reference(hidden, weight, bias, rows)
    wanted = head_statistics.reference(hidden[is_listed], weight, bias)
    for own, other in zip(found, wanted, strict=True):
        assert torch.equal(own[is_listed], other)
