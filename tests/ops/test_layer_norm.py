import pytest
import torch

from multiexit_engine.ops import layer_norm
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

SHAPES = pytest.mark.parametrize("shape", [(1, 7), (3, 63), (100, 1031)])


def inputs(shape, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 5
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return x.to(device), weight.to(device), bias.to(device), 1e-5


@SHAPES
def test_reference_equals_the_formula(shape):
    x, weight, bias, eps = inputs(shape)
    wide = x.double()
    centred = wide - wide.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).sqrt()
    truth = centred / scale * weight.double() + bias.double()
    actual = layer_norm.reference(x, weight, bias, eps)
    torch.testing.assert_close(actual.double(), truth, atol=1e-5, rtol=0)


@all_backends(layer_norm)
@SHAPES
def test_backend_is_as_good_as_the_reference(backend, shape):
    function = implementation_or_skip(layer_norm, backend)
    args = inputs(shape, device_for(layer_norm, backend))
    assert_as_good_as_reference(layer_norm, function(*args), args, 2e-6)
