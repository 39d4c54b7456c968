"""Products with quantized weights on every instruction set, held against float64."""

import pytest
import torch

from multiexit_engine._native import contrast_heads, contrast_tokens, head_logits, linear
from multiexit_engine.quantization import Quantization, QuantizedWeight, dequantize, quantize
from tests.native.test_dense import assert_same_beside_any_others, poisoned
from tests.native.test_heads import choices

NAMES = ("int8", "int8-g64", "int4", "int4-g64", "fp8")
KINDS = pytest.mark.parametrize("how", [*map(Quantization.parse, NAMES)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SHAPES = pytest.mark.parametrize(
    ("rows", "inner", "outer"),
    [(1, 1, 1), (1, 768, 5), (2, 63, 31), (3, 65, 17), (4, 1031, 9), (5, 100, 257), (33, 544, 21)],
)


def quantized(shape, how, seed=1):
    """A quantized random matrix whose codes and scales lie in the midst of NaN and 0xff."""
    weight = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), how)
    codes = torch.full((weight.codes.numel() + 38,), -1).to(weight.codes.dtype)
    codes = codes[19:-19].view(weight.codes.shape).copy_(weight.codes)
    scales = torch.full((weight.scales.numel() + 38,), torch.nan, dtype=torch.bfloat16)
    scales = scales[19:-19].view(weight.scales.shape).copy_(weight.scales)
    return QuantizedWeight(codes, scales, shape[1], how)


@KINDS
@DTYPES
@SHAPES
def test_product_equals_the_formula(isa, dtype, how, rows, inner, outer):
    x, weight = poisoned((rows, inner), dtype, 0), quantized((outer, inner), how)
    bias = poisoned((outer,), dtype, 2)
    wide = dequantize(weight, torch.float64)
    truth = x.double() @ wide.T + bias.double()
    size = x.double().abs() @ wide.abs().T + bias.double().abs()
    actual = linear(x, weight, bias)
    assert actual.dtype is dtype
    error = (actual.double() - truth).abs()
    rounding = torch.finfo(dtype).eps * truth.abs() * (dtype is not torch.float32)
    assert bool((error <= rounding + 4e-7 * size + 1e-7).all())


@KINDS
@SHAPES
def test_product_has_the_bits_of_the_dequantized_matrix(isa, how, rows, inner, outer):
    x, weight = poisoned((rows, inner), torch.float32, 0), quantized((outer, inner), how)
    assert torch.equal(linear(x, weight, None), linear(x, dequantize(weight), None))


@pytest.mark.parametrize("columns", [256, 40])
def test_every_code_of_fp8_is_read_as_its_number(isa, columns):
    codes = torch.arange(256)[None, :columns].to(torch.uint8)
    codes[codes & 127 == 127] = 0
    codes = torch.nn.functional.pad(codes, (0, -columns % 32))
    scales = torch.tensor([[3.0]], dtype=torch.bfloat16)
    weight = QuantizedWeight(codes, scales, columns, Quantization.parse("fp8"))
    found = linear(torch.eye(columns), weight, None)
    assert torch.equal(found, dequantize(weight).T)


@KINDS
@DTYPES
@pytest.mark.parametrize("inner", [100, 3100])
def test_product_of_a_row_is_the_same_beside_up_to_32_others(isa, how, dtype, inner):
    assert_same_beside_any_others(poisoned((33, inner), dtype, 0), quantized((57, inner), how))


@KINDS
def test_product_is_the_same_for_any_number_of_threads(isa, threads, how):
    weight = quantized((1031, 768), how)
    for rows in (1, 9):
        x = poisoned((rows, 768), torch.float32, 0)
        torch.set_num_threads(1)
        alone = linear(x, weight, None)
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(linear(x, weight, None), alone)


@DTYPES
@KINDS
@pytest.mark.parametrize("lower_is_quantized", [True, False])
def test_heads_are_those_of_the_dequantized_matrices(isa, how, dtype, lower_is_quantized):
    upper, lower = (poisoned((3, 100), dtype, seed) for seed in (0, 1))
    upper_weight, lower_weight = (quantized((1031, 100), how, seed) for seed in (2, 3))
    wide = [dequantize(weight) for weight in (upper_weight, lower_weight)]
    if not lower_is_quantized:
        lower_weight = poisoned((1031, 100), dtype, 3)
        wide[1] = lower_weight.float()
    logits = head_logits(upper, upper_weight)
    torch.testing.assert_close(logits, upper.float() @ wide[0].T, rtol=0, atol=1e-4)
    alpha = torch.full((3,), 0.1)
    args = upper.float(), wide[0], lower.float(), wide[1], alpha
    actual = contrast_heads(upper, upper_weight, lower, lower_weight, alpha)
    expected = contrast_heads(*args)
    # where bfloat16 is multiplied as such, the lower head's sums are rounded otherwise
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 if lower_is_quantized else 0.5)
    tokens, _ = contrast_tokens(upper, upper_weight, lower, lower_weight, alpha, *choices(3, 0.0))
    assert torch.equal(tokens, actual.argmax(-1))
