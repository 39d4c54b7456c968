"""Norm, queries, keys and values, rotation and the cache in one launch, against float64."""

import math

import pytest
import torch

from multiexit_engine.ops.rotary import rotary

qkv = pytest.importorskip("multiexit_engine.kernels.qkv")
products = pytest.importorskip("multiexit_engine.kernels.products")

# rows, width, heads, key-value heads, head_dim: sums cut and not, every tile, PyTorch's product
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 520, 3, 1, 10), (5, 48, 2, 2, 16), (20, 33, 4, 2, 6), (66, 24, 2, 1, 8)]
)
IS_TURNED = pytest.mark.parametrize("is_turned", [False, True], ids=["still", "turned"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)], ids=str
)
BLOCK_SIZE, POSITIONS = 4, 90


class Case:
    def __init__(self, shape, dtype, is_turned, device):
        rows, width, heads, kv_heads, head_dim = self.shape = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            return torch.randn(size, generator=generator)

        outputs = (heads + 2 * kv_heads) * head_dim
        self.x = (3 * normal(rows, width) + 1).to(device)
        self.weight = (normal(outputs, width) / width**0.5).to(dtype).to(device)
        self.bias = normal(outputs).to(dtype).to(device)
        self.norm = products.Norm(*(normal(width).to(dtype).to(device) for _ in range(2)), eps=1e-5)
        blocks = rows // BLOCK_SIZE + 3
        size = (2, blocks, BLOCK_SIZE, kv_heads, head_dim)
        caches = torch.full(size, math.nan, dtype=dtype, device=device)
        order = torch.randperm(blocks * BLOCK_SIZE, generator=generator)[:rows]
        self.slots = qkv.Slots(*caches, order.to(device))
        self.turn = None
        if is_turned:
            angles = 6 * torch.rand(POSITIONS, head_dim // 2, generator=generator)
            tables = (table.to(dtype).to(device) for table in (angles.cos(), angles.sin()))
            positions = torch.randint(POSITIONS, (rows,), generator=generator)
            self.turn = qkv.Turn(*tables, positions.to(device))

    def truth(self):
        """Queries, keys and values in float64."""
        rows, width, heads, kv_heads, head_dim = self.shape
        gain, shift, eps = self.norm
        x = torch.nn.functional.layer_norm(
            self.x.double(), (width,), gain.double(), shift.double(), eps
        )
        fused = (x @ self.weight.double().T + self.bias.double()).view(rows, -1, head_dim)
        query, key, value = fused.split([heads, kv_heads, kv_heads], 1)
        if self.turn is not None:
            cos, sin, positions = self.turn
            query, key = rotary.reference(query, key, cos.double(), sin.double(), positions)
        return query, key, value

    def found(self):
        query = qkv.store_qkv(self.x, self.weight, self.bias, self.norm, self.slots, self.turn)
        caches = (cache.flatten(0, 1) for cache in self.slots[:2])
        return query, *(cache[self.slots.mapping] for cache in caches)


@IS_TURNED
@DTYPES
@SHAPES
def test_queries_keys_and_values_are_those_of_float64(shape, dtype, tolerance, is_turned, device):
    case = Case(shape, dtype, is_turned, device)
    for found, truth in zip(case.found(), case.truth(), strict=True):
        assert found.dtype == dtype
        assert ((found.double() - truth).norm() / truth.norm()).item() < tolerance


@IS_TURNED
def test_no_other_slot_is_written(is_turned, device):
    case = Case((5, 48, 2, 2, 16), torch.float32, is_turned, device)
    case.found()
    for cache in case.slots[:2]:
        untouched = torch.ones(cache.shape[0] * BLOCK_SIZE, dtype=torch.bool)
        untouched[case.slots.mapping] = False
        assert cache.flatten(0, 1)[untouched].isnan().all()


def test_no_rows_write_nothing(device):
    case = Case((5, 48, 2, 2, 16), torch.float32, True, device)
    case.x = case.x[:0]
    case.slots = case.slots._replace(mapping=case.slots.mapping[:0])
    query, _, _ = case.found()
    assert query.shape == (0, 2, 16)
    assert all(cache.isnan().all() for cache in case.slots[:2])
