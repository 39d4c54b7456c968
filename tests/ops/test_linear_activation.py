import pytest
import torch
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from multiexit_engine.ops import linear_activation
from multiexit_engine.ops.activation import ACTIVATIONS
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

KINDS = pytest.mark.parametrize("kind", ACTIVATIONS)


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 63), (100, 63), (100,)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@KINDS
def test_reference_is_what_transformers_means_by_the_name(kind):
    x, weight, bias = inputs()
    truth = ACT2FN[kind](linear(x.double(), weight.double(), bias.double()))
    actual = linear_activation.reference(x, weight, bias, kind).double()
    torch.testing.assert_close(actual, truth, atol=3e-5, rtol=0)


@all_backends(linear_activation)
@KINDS
def test_backend_is_as_good_as_the_reference(backend, kind):
    function = implementation_or_skip(linear_activation, backend)
    args = (*inputs(device_for(linear_activation, backend)), kind)
    assert_as_good_as_reference(linear_activation, function(*args), args, 2e-5)
