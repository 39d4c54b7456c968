import pytest
import torch

from multiexit_engine.ops import rotary, rotate_and_write_kv
from tests.ops.backends import all_backends, device_for, implementation_or_skip

SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 2), (3, 1, 10), (4, 2, 64), (0, 2, 6)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SLOTS = torch.tensor([13, 2, 7, 0, 19])


def inputs(heads, kv_heads, head_dim, dtype=torch.float32, device="cpu"):
    """Parts of one fused projection, over a cache that is NaN."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(5, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    query, key, value = fused.to(device).split([heads, kv_heads, kv_heads], 1)
    angles = torch.rand(40, head_dim // 2, generator=generator) * 6
    positions = torch.tensor([0, 39, 7, 7, 21])
    caches = torch.full((2, 5, 4, kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
    turn = (each.to(device) for each in (angles.cos(), angles.sin(), positions))
    return query, key, value, *turn, *caches, SLOTS.to(device)


def assert_placed(function, args, tolerance):
    query, key, value, cos, sin, positions, key_cache, value_cache, slots = args
    wide = [each.double() for each in (query, key, cos, sin)]
    turned_query, turned_key = rotary.reference(*wide, positions)
    found = function(*args)
    torch.testing.assert_close(found.double(), turned_query, atol=tolerance, rtol=tolerance)
    stored = key_cache.flatten(0, 1)[slots].double()
    torch.testing.assert_close(stored, turned_key, atol=tolerance, rtol=tolerance)
    assert torch.equal(value_cache.flatten(0, 1)[slots], value)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[SLOTS] = False
    for cache in (key_cache, value_cache):
        assert cache.flatten(0, 1)[untouched].isnan().all()


@SHAPES
def test_reference_turns_and_stores(heads, kv_heads, head_dim):
    assert_placed(rotate_and_write_kv.reference, inputs(heads, kv_heads, head_dim), 1e-5)


@all_backends(rotate_and_write_kv)
@DTYPES
@SHAPES
def test_backend_turns_and_stores(backend, heads, kv_heads, head_dim, dtype):
    function = implementation_or_skip(rotate_and_write_kv, backend)
    device = device_for(rotate_and_write_kv, backend)
    args = inputs(heads, kv_heads, head_dim, dtype, device)
    assert_placed(function, args, 1e-5 if dtype == torch.float32 else 1e-2)
