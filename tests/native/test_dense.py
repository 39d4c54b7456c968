"""Products and norms on every instruction set, held against float64."""

import pytest
import torch

from multiexit_engine._native import layer_norm, linear, linear_activation, rms_norm
from multiexit_engine.ops.activation import ACTIVATIONS

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SHAPES = pytest.mark.parametrize(
    ("rows", "inner", "outer"),
    [(1, 1, 1), (1, 768, 5), (2, 63, 31), (5, 17, 9), (7, 100, 257), (13, 16, 64), (33, 1031, 3)],
)


def poisoned(shape, dtype, seed):
    """Random numbers with NaN before and behind them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    around = torch.full((values.numel() + 38,), torch.nan, dtype=dtype)
    inside = around[19 : 19 + values.numel()].view(shape)
    return inside.copy_(values)


@DTYPES
@SHAPES
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_equals_the_formula(isa, dtype, rows, inner, outer, has_bias):
    x, weight = poisoned((rows, inner), dtype, 0), poisoned((outer, inner), dtype, 1)
    bias = poisoned((outer,), dtype, 2) if has_bias else None
    truth = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    actual = linear(x, weight, bias)
    assert actual.dtype is dtype
    error = (actual.double() - truth).abs()
    rounding = torch.finfo(dtype).eps * truth.abs() * (dtype is not torch.float32)
    assert bool((error <= rounding + 4e-7 * size + 1e-7).all())


@DTYPES
@SHAPES
@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "quick_gelu", "relu", "silu"])
def test_activation_of_a_product_equals_the_formula(isa, dtype, rows, inner, outer, kind):
    x, weight = poisoned((rows, inner), dtype, 0), poisoned((outer, inner), dtype, 1)
    bias = poisoned((outer,), dtype, 2)
    product = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    truth = ACTIVATIONS[kind](product)
    actual = linear_activation(x, weight, bias, kind)
    assert actual.dtype is dtype
    error = (actual.double() - truth).abs()
    rounding = torch.finfo(dtype).eps * truth.abs() * (dtype is not torch.float32)
    assert bool((error <= rounding + 6e-7 * size + 2e-6).all())


def test_gelu_is_exact_in_its_tail_and_at_its_ends(isa):
    ends = [-torch.inf, torch.inf, torch.nan, -0.0, 0.0, -1e30, 1e30]
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor(ends)])[:, None]
    actual = linear_activation(x, torch.ones(1, 1), None, "gelu").double()
    wide = x.double()
    truth = wide * torch.special.erfc(-wide / 2**0.5) / 2
    torch.testing.assert_close(actual, truth, rtol=3e-6, atol=0.0, equal_nan=True)


def test_activation_of_a_product_is_the_same_beside_any_others(isa, threads):
    x, weight = poisoned((33, 100), torch.float32, 0), poisoned((57, 100), torch.float32, 1)
    whole = linear_activation(x, weight, None, "gelu")
    for start, stop in ((0, 1), (5, 9), (16, 33)):
        part = linear_activation(x[start:stop], weight, None, "gelu")
        assert torch.equal(part, whole[start:stop])


def assert_same_beside_any_others(x, weight):
    """Products of any number of neighbouring rows have the bits of all rows' product."""
    whole, total = linear(x, weight, None), x.shape[0]
    for count in range(1, total):
        for start in sorted({0, (total - count) // 2, total - count}):
            part = linear(x[start : start + count], weight, None)
            assert torch.equal(part, whole[start : start + count])


# 3100 columns of a few rows are taken in blocks
@DTYPES
@pytest.mark.parametrize("inner", [100, 1031, 3100])
def test_product_of_a_row_is_the_same_beside_up_to_32_others(isa, dtype, inner):
    assert_same_beside_any_others(poisoned((33, inner), dtype, 0), poisoned((57, inner), dtype, 1))


@DTYPES
def test_product_of_a_row_is_the_same_among_hundreds(isa, threads, dtype):
    x, weight = poisoned((601, 40), dtype, 0), poisoned((57, 40), dtype, 1)
    whole = linear(x, weight, None)
    assert not whole.isnan().any()
    for start in range(0, 601, 30):
        assert torch.equal(linear(x[start : start + 30], weight, None), whole[start : start + 30])


def test_product_is_the_same_for_any_number_of_threads(isa, threads):
    x, weight = poisoned((9, 768), torch.float32, 0), poisoned((1031, 768), torch.float32, 1)
    torch.set_num_threads(1)
    alone = linear(x, weight, None)
    torch.set_num_threads(threads)
    for _ in range(20):
        assert torch.equal(linear(x, weight, None), alone)


def test_nan_of_a_weight_stays_in_its_column(isa):
    x, weight = poisoned((3, 40), torch.float32, 0), poisoned((9, 40), torch.float32, 1)
    weight[4, 39] = torch.nan
    assert linear(x, weight, None).isnan().all(0).tolist() == [i == 4 for i in range(9)]


@pytest.mark.parametrize("value", [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, 1e-3, torch.inf])
def test_half_precision_numbers_convert_exactly(isa, value):
    one = torch.ones(1, 1, dtype=torch.float16)
    assert torch.equal(linear(one, torch.tensor([[value]]).half(), None)[0, 0], one[0, 0] * value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_pytorch_rounds(isa, dtype):
    values = torch.randn(4099, generator=torch.Generator().manual_seed(0)) * 1e-4
    values = torch.cat([values, values * 1e9, values * 1e-4, torch.tensor([torch.nan, torch.inf])])
    weight = values.to(dtype)
    shift = (values * 0.7).to(dtype)
    expected = (weight.float() + shift.float()).to(dtype)
    actual = linear(torch.ones(1, 1, dtype=dtype), weight[:, None], shift)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (100, 1031), (2, 5, 16)])
def test_norms_equal_the_formula(isa, dtype, shape):
    x = poisoned(shape, dtype, 0) * 3 + 1
    weight, bias = poisoned(shape[-1:], dtype, 1), poisoned(shape[-1:], dtype, 2)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    layer = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    layer = layer * weight.double() + bias.double()
    rms = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    tolerance = max(4e-6, 4 * torch.finfo(dtype).eps) if dtype is not torch.float32 else 1e-5
    for actual, truth in (
        (layer_norm(x, weight, bias, 1e-5), layer),
        (rms_norm(x, weight, 1e-5), rms),
    ):
        assert actual.dtype is dtype
        torch.testing.assert_close(actual.double(), truth, rtol=tolerance, atol=tolerance)
