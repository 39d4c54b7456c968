import pytest
import torch

from multiexit_engine.ops import head_logits
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

SHAPES = pytest.mark.parametrize(
    ("rows", "vocab", "hidden_size"), [(1, 7, 1), (3, 100, 63), (2, 1031, 96), (9, 65, 33)]
)


def operands(rows, vocab, hidden_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, hidden_size), (vocab, hidden_size), (vocab,)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@SHAPES
def test_equals_the_product_in_float64(rows, vocab, hidden_size):
    hidden, weight, bias = operands(rows, vocab, hidden_size)
    truth = hidden.double() @ weight.double().T + bias.double()
    actual = head_logits.reference(hidden, weight, bias)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)


@SHAPES
def test_half_precision_gives_float32(rows, vocab, hidden_size):
    hidden, weight, _ = operands(rows, vocab, hidden_size, torch.bfloat16)
    truth = hidden.double() @ weight.double().T
    actual = head_logits.reference(hidden, weight)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), truth, rtol=1e-2, atol=1e-2)


def test_no_rows():
    assert head_logits.reference(torch.zeros(0, 8), torch.zeros(5, 8)).shape == (0, 5)


def test_float64_stays_float64():
    assert head_logits.reference(*(x.double() for x in operands(1, 7, 4))).dtype == torch.float64


@all_backends(head_logits)
@SHAPES
def test_backend_matches_reference(backend, rows, vocab, hidden_size):
    implementation = implementation_or_skip(head_logits, backend)
    device = device_for(head_logits, backend)
    args = tuple(x.to(device) for x in operands(rows, vocab, hidden_size))
    assert_as_good_as_reference(head_logits, implementation(*args), args, tolerance=1e-5)
