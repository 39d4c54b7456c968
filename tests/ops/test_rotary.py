import pytest
import torch

from multiexit_engine.ops import rotary
from tests.ops.backends import all_backends, device_for, implementation_or_skip

SHAPES = pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"), [(1, 1, 1, 2), (7, 3, 1, 10), (63, 4, 2, 64)]
)
MAX_POSITIONS = 300


def inputs(tokens, heads, kv_heads, head_dim, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(tokens, heads, head_dim, generator=generator)
    key = torch.randn(tokens, kv_heads, head_dim, generator=generator)
    angles = torch.rand(MAX_POSITIONS, head_dim // 2, generator=generator) * 6
    positions = torch.randint(0, MAX_POSITIONS, (tokens,), generator=generator)
    return tuple(x.to(device) for x in (query, key, angles.cos(), angles.sin(), positions))


def truth(x, cos, sin, positions):
    """Pairs as complex numbers, each turned by its angle."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turn = torch.complex(cos.double(), sin.double())[positions][:, None]
    return torch.cat(((pairs * turn).real, (pairs * turn).imag), dim=-1)


def assert_turned(actual, args):
    query, key, *rest = args
    for x, turned in zip((query, key), actual, strict=True):
        torch.testing.assert_close(turned.double(), truth(x, *rest), atol=2e-6, rtol=0)


@SHAPES
def test_reference_equals_the_formula(tokens, heads, kv_heads, head_dim):
    args = inputs(tokens, heads, kv_heads, head_dim)
    assert_turned(rotary.reference(*args), args)


def test_inputs_are_left_as_they_were():
    query, key, *rest = inputs(7, 3, 1, 10)
    before = query.clone(), key.clone()
    rotary(query, key, *rest)
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


@all_backends(rotary)
@SHAPES
def test_backend_equals_the_formula(backend, tokens, heads, kv_heads, head_dim):
    function = implementation_or_skip(rotary, backend)
    args = inputs(tokens, heads, kv_heads, head_dim, device_for(rotary, backend))
    assert_turned(function(*args), args)
