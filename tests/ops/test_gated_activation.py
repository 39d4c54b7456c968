import pytest
import torch
from transformers.activations import ACT2FN

from multiexit_engine.ops import gated_activation
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

SHAPES = pytest.mark.parametrize("shape", [(1, 1), (7, 63), (3, 1031)])
KINDS = pytest.mark.parametrize("kind", ["silu", "gelu_new"])


def inputs(shape, device="cpu"):
    rows, inner = shape
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, 2 * inner, generator=generator) * 4).to(device)


@KINDS
@SHAPES
def test_reference_multiplies_the_activated_first_half_with_the_second(shape, kind):
    x = inputs(shape)
    inner = shape[1]
    truth = ACT2FN[kind](x[:, :inner].double()) * x[:, inner:].double()
    actual = gated_activation.reference(x, kind).double()
    torch.testing.assert_close(actual, truth, atol=1e-6, rtol=1e-6)


@all_backends(gated_activation)
@KINDS
@SHAPES
def test_backend_is_as_good_as_the_reference(backend, shape, kind):
    function = implementation_or_skip(gated_activation, backend)
    args = (inputs(shape, device_for(gated_activation, backend)), kind)
    assert_as_good_as_reference(gated_activation, function(*args), args, 2e-6)
