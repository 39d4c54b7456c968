import pytest
import torch
from transformers.activations import ACT2FN

from multiexit_engine.ops import activation
from multiexit_engine.ops.activation import ACTIVATIONS
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

KINDS = pytest.mark.parametrize("kind", ACTIVATIONS)


def inputs(device="cpu"):
    return (torch.randn(7, 63, generator=torch.Generator().manual_seed(0)) * 4).to(device)


@KINDS
def test_reference_is_what_transformers_means_by_the_name(kind):
    x = inputs()
    truth = ACT2FN[kind](x.double())
    actual = activation.reference(x, kind).double()
    torch.testing.assert_close(actual, truth, atol=2e-6, rtol=0)


@all_backends(activation)
@KINDS
def test_backend_is_as_good_as_the_reference(backend, kind):
    function = implementation_or_skip(activation, backend)
    args = (inputs(device_for(activation, backend)), kind)
    assert_as_good_as_reference(activation, function(*args), args, 2e-6)
