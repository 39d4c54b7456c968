import pytest
import torch

from multiexit_engine.ops import linear
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

SHAPES = pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 7, 1), (3, 63, 100), (9, 100, 7)])
BIAS = pytest.mark.parametrize("has_bias", [True, False])


def inputs(rows, inner, outer, has_bias, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=generator).to(device)
    weight = torch.randn(outer, inner, generator=generator).to(device)
    bias = torch.randn(outer, generator=generator).to(device)
    return x, weight, bias if has_bias else None


@BIAS
@SHAPES
def test_reference_equals_the_formula(rows, inner, outer, has_bias):
    x, weight, bias = inputs(rows, inner, outer, has_bias)
    truth = (x.double()[:, None] * weight.double()).sum(-1)
    truth = truth if bias is None else truth + bias.double()
    actual = linear.reference(x, weight, bias)
    torch.testing.assert_close(actual.double(), truth, atol=1e-4, rtol=0)


@all_backends(linear)
@BIAS
@SHAPES
def test_backend_is_as_good_as_the_reference(backend, rows, inner, outer, has_bias):
    function = implementation_or_skip(linear, backend)
    args = inputs(rows, inner, outer, has_bias, device_for(linear, backend))
    assert_as_good_as_reference(linear, function(*args), args, 2e-5)
