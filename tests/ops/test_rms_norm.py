import pytest
import torch

from multiexit_engine.ops import rms_norm
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

SHAPES = pytest.mark.parametrize("shape", [(1, 7), (3, 63), (5, 3, 16), (100, 1031)])


def inputs(shape, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3
    weight = torch.randn(shape[-1], generator=generator)
    return x.to(device), weight.to(device), 1e-6


@SHAPES
def test_reference_equals_the_formula(shape):
    x, weight, eps = inputs(shape)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    actual = rms_norm.reference(x, weight, eps)
    torch.testing.assert_close(actual.double(), truth, atol=1e-5, rtol=0)


def test_squares_of_half_precision_numbers_do_not_overflow():
    x = torch.full((1, 64), 6e4, dtype=torch.float16)
    actual = rms_norm.reference(x, torch.ones(64, dtype=torch.float16), 1e-6)
    torch.testing.assert_close(actual, torch.ones_like(x), atol=1e-3, rtol=0)


@all_backends(rms_norm)
@SHAPES
def test_backend_is_as_good_as_the_reference(backend, shape):
    function = implementation_or_skip(rms_norm, backend)
    args = inputs(shape, device_for(rms_norm, backend))
    assert_as_good_as_reference(rms_norm, function(*args), args, 2e-6)
