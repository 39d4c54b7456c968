"""Products of listed rows: those of ``linear``, bit for bit on a GPU, and nothing of other rows."""

import math

import pytest
import torch

from multiexit_engine.ops import compact_rows, linear, listed_linear
from tests.ops.backends import all_backends, device_for, implementation_or_skip

# rows, columns, outputs: one step, cut sums, more rows than are streamed at once
SHAPES = pytest.mark.parametrize("shape", [(5, 33, 7), (40, 520, 34), (200, 64, 40)], ids=str)
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=str
)


def operands(shape, dtype, share=0.3):
    """NaN in every row that is not listed."""
    rows, columns, outputs = shape
    generator = torch.Generator().manual_seed(1)
    is_listed = torch.rand(rows, generator=generator) < share
    x = torch.randn(rows, columns, generator=generator)
    x[~is_listed] = math.nan
    weight = torch.randn(outputs, columns, generator=generator) / columns**0.5
    bias = torch.randn(outputs, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), is_listed


def relative_error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@DTYPES
@SHAPES
def test_reference_equals_the_formula(shape, dtype, tolerance):
    x, weight, bias, is_listed = operands(shape, dtype)
    found = listed_linear.reference(x, weight, bias, compact_rows.reference(is_listed))
    truth = x[is_listed].double() @ weight.double().T + bias.double()
    assert relative_error(found[is_listed], truth) < tolerance


@all_backends(listed_linear)
@DTYPES
@SHAPES
def test_backend_equals_the_formula(shape, dtype, tolerance, backend):
    function = implementation_or_skip(listed_linear, backend)
    x, weight, bias, is_listed = operands(shape, dtype)
    truth = x[is_listed].double() @ weight.double().T + bias.double()
    device = device_for(listed_linear, backend)
    rows = compact_rows.implementation(backend)(is_listed.to(device))
    found = function(x.to(device), weight.to(device), bias.to(device), rows).cpu()
    assert relative_error(found[is_listed], truth) < tolerance


@all_backends(listed_linear)
@DTYPES
def test_a_listed_row_has_the_bits_that_it_has_among_few(dtype, tolerance, backend):
    function = implementation_or_skip(listed_linear, backend)
    x, weight, bias, is_listed = operands((200, 520, 40), dtype)
    device = device_for(listed_linear, backend)
    x, weight, bias = (each.to(device) for each in (x, weight, bias))
    rows = compact_rows.implementation(backend)(is_listed.to(device))
    found = function(x, weight, bias, rows)
    for row in is_listed.nonzero()[:3, 0].tolist():
        alone = linear.implementation(backend)(x[row : row + 1], weight, bias)
        assert torch.equal(found[row : row + 1], alone)


@all_backends(listed_linear)
def test_no_listed_row_is_no_work(backend):
    function = implementation_or_skip(listed_linear, backend)
    x, weight, bias, is_listed = operands((70, 33, 7), torch.float32, share=0.0)
    device = device_for(listed_linear, backend)
    rows = compact_rows.implementation(backend)(is_listed.to(device))
    nothing = torch.full_like(weight, math.nan)
    assert function(x.to(device), nothing.to(device), bias.to(device), rows).shape == (70, 7)
