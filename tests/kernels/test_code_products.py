"""Products with quantized weights against the dequantized matrix in float64."""

import pytest
import torch
from torch.nn.functional import silu

from multiexit_engine.quantization import Quantization, QuantizedWeight, dequantize, quantize

products = pytest.importorskip("multiexit_engine.kernels.products")

KINDS = pytest.mark.parametrize("name", ["int8", "int8-g64", "int4", "int4-g64", "fp8"])
# rows, columns, outputs: less than a group, odd sizes, cut sums, more rows than are streamed
SHAPES = pytest.mark.parametrize("shape", [(1, 7, 3), (5, 97, 40), (20, 520, 34), (70, 33, 6)])
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)


def operands(shape, name, dtype, device):
    rows, columns, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).to(dtype).to(device)
    weight = quantize(torch.randn(outputs, columns, generator=generator), Quantization.parse(name))
    codes, scales = weight.codes.to(device), weight.scales.to(device)
    return x, QuantizedWeight(codes, scales, columns, weight.quantization)


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@DTYPES
@SHAPES
@KINDS
def test_nothing_is_rounded_before_the_sum(name, shape, dtype, tolerance, device):
    x, weight = operands(shape, name, dtype, device)
    found = products.head_logits(x, weight)
    truth = x.double() @ dequantize(weight, torch.float64).T
    assert found.dtype == torch.float32
    assert error(found, truth) < tolerance


@KINDS
def test_gates_of_quantized_matrices(name, device):
    x, weight = operands((3, 300, 80), name, torch.float32, device)
    found = products.product(x, weight, activation="silu", gated=True)
    gate, through = (x.double() @ dequantize(weight, torch.float64).T).chunk(2, -1)
    assert error(found, silu(gate) * through) < 1e-6


@KINDS
def test_a_row_has_the_same_bits_beside_any_others(name, device):
    x, weight = operands((40, 520, 34), name, torch.bfloat16, device)
    together = products.head_logits(x, weight)
    for rows in (slice(5, 6), slice(7, 30)):
        assert torch.equal(products.head_logits(x[rows], weight), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_of_fp8_is_multiplied_as_its_number(dtype, device):
    codes = torch.arange(256).to(torch.uint8)
    codes[codes & 127 == 127] = 0
    scales = torch.ones(256, 1, dtype=torch.bfloat16)
    # a number in each row, amid columns of zeros
    stored = torch.zeros(256, 32, dtype=torch.uint8)
    stored[:, 17] = codes
    how = Quantization.parse("fp8")
    weight = QuantizedWeight(stored.to(device), scales.to(device), 32, how)
    x = torch.eye(32)[16:18].to(dtype).to(device)
    found = products.head_logits(x, weight).cpu()
    assert found[0].tolist() == [0.0] * 256
    assert found[1].tolist() == codes.view(torch.float8_e4m3fn).float().tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
@pytest.mark.parametrize("name", ["int8", "int8-g64", "int4", "int4-g64"])
def test_codes_are_read_once(name, bytes_read):
    x, weight = operands((20, 520, 34), name, torch.bfloat16, "cpu")
    products.head_logits(x, weight)
    assert bytes_read(weight.codes) == weight.codes.nbytes
    assert bytes_read(weight.scales) == weight.scales.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
def test_numbers_of_fp8_are_read_once_and_their_scale_for_each_part_of_a_sum(bytes_read):
    x, weight = operands((20, 520, 34), "fp8", torch.bfloat16, "cpu")
    products.head_logits(x, weight)
    # padding is not read
    assert bytes_read(weight.codes) == weight.codes[:, :520].nbytes
    assert bytes_read(weight.scales) == products.splits_for(34, 520) * weight.scales.nbytes
