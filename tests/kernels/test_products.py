"""Skinny products against float64, with everything that may stand before and behind them."""

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, silu

products = pytest.importorskip("multiexit_engine.kernels.products")
norms = pytest.importorskip("multiexit_engine.kernels.norms")

# rows, columns, outputs: one step, odd sizes, cut sums, every tile, PyTorch's product
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 7, 1), (3, 63, 100), (4, 1031, 40), (17, 520, 34), (33, 100, 70), (65, 64, 6)]
)
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)],
    ids=str,
)
NORMS = pytest.mark.parametrize("kind", ["layer", "rms"])


def poisoned(tensor, dtype, device):
    """The same numbers amid NaN, in rows that lie farther apart than they are long."""
    rows, columns = tensor.shape
    around = torch.full((rows + 2, columns + 5), math.nan, dtype=dtype, device=device)
    around[1:-1, :columns] = tensor
    return around[1:-1, :columns]


def dense(tensor, dtype, device):
    """The same numbers, contiguous, with NaN behind them."""
    around = torch.full((tensor.numel() + 300,), math.nan, dtype=dtype, device=device)
    around[: tensor.numel()] = tensor.flatten()
    return around[: tensor.numel()].view(tensor.shape)


class Case:
    def __init__(self, shape, dtype, device, *, center=0.0):
        rows, columns, outputs = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            return torch.randn(size, generator=generator)

        self.x = poisoned(normal(rows, columns) + center, dtype, device)
        self.wide_x = poisoned(3 * normal(rows, columns) + center, torch.float32, device)
        self.weight = dense(normal(outputs, columns) / columns**0.5, dtype, device)
        self.bias = dense(normal(outputs), dtype, device)
        self.gain = dense(1 + 0.3 * normal(columns), dtype, device)
        self.shift = dense(normal(columns), dtype, device)
        self.residual = normal(rows, outputs).to(device)


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def linear_truth(x, case):
    return x.double() @ case.weight.double().T + case.bias.double()


@DTYPES
@SHAPES
def test_product_bias_activation_and_residual(shape, dtype, tolerance, device):
    case = Case(shape, dtype, device)
    found = products.product(
        case.x, case.weight, case.bias,
        activation="gelu", residual=case.residual, dtype=torch.float32,
    )  # fmt: skip
    truth = case.residual.double() + gelu(linear_truth(case.x, case))
    assert found.dtype == torch.float32
    assert relative_error(found, truth) < tolerance


def normed(case, kind):
    x, gain = case.wide_x.double(), case.gain.double()
    if kind == "rms":
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * gain
    return layer_norm(x, gain.shape, gain, case.shift.double(), 1e-5)


@NORMS
@DTYPES
@SHAPES
def test_rows_are_normalised_before_the_product(shape, dtype, tolerance, kind, device):
    case = Case(shape, dtype, device)
    norm = products.Norm(case.gain, case.shift if kind == "layer" else None, 1e-5)
    found = products.product(
        case.wide_x, case.weight, case.bias, norm_before=norm, dtype=torch.float32
    )
    assert relative_error(found, linear_truth(normed(case, kind), case)) < tolerance


@DTYPES
@SHAPES
def test_gates_let_the_second_half_through(shape, dtype, tolerance, device):
    case = Case((*shape[:2], 2 * shape[2]), dtype, device)
    found = products.product(case.x, case.weight, case.bias, activation="silu", gated=True)
    gate, through = linear_truth(case.x, case).chunk(2, -1)
    assert found.shape == (shape[0], shape[2]) and found.dtype == dtype
    assert relative_error(found, silu(gate) * through) < 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_beside_any_others(dtype, device):
    case = Case((products.MAX_ROWS, 520, 40), dtype, device)
    norm = products.Norm(case.gain, case.shift, 1e-5)

    def run(rows):
        return products.product(
            case.wide_x[rows], case.weight, case.bias, norm_before=norm, dtype=torch.float32
        )

    together = run(slice(None))
    for rows in (slice(5, 6), slice(7, 23), slice(1, 33)):
        assert torch.equal(run(rows), together[rows])


@NORMS
def test_a_norm_alone_is_the_norm_before_a_product(kind, device):
    case = Case((3, 300, 1), torch.bfloat16, device)
    norm = products.Norm(case.gain, case.shift if kind == "layer" else None, 1e-5)
    identity = torch.eye(300, dtype=torch.bfloat16, device=device)
    found = products.product(case.wide_x, identity, norm_before=norm)
    assert torch.equal(found, norms.norm(case.wide_x, *norm, dtype=torch.bfloat16))


@NORMS
def test_a_mean_far_from_zero_costs_no_digits(kind, device):
    case = Case((3, 300, 1), torch.float32, device, center=1000.0)
    shift = case.shift if kind == "layer" else None
    found = norms.norm(case.wide_x, case.gain, shift, 1e-5, torch.float32)
    assert relative_error(found, normed(case, kind)) < 3e-5


def test_no_rows_give_no_rows(device):
    case = Case((1, 40, 6), torch.float32, device)
    norm = products.Norm(case.gain, case.shift, 1e-5)
    assert products.product(case.x[:0], case.weight, norm_before=norm).shape == (0, 6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the order of a GPU is its own")
def test_the_part_that_arrives_last_decides_nothing():
    from tests.kernels.interpreter import program_order

    case = Case((2, 1100, 40), torch.float32, "cpu")
    results = []
    for seed in (None, 1, 2, 3):
        with program_order(seed):
            results.append(products.product(case.x, case.weight, case.bias))
    assert products.splits_for(40, 1100) > 2
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
@pytest.mark.parametrize("rows", [1, 40])
def test_the_weights_are_read_once(rows, bytes_read):
    case = Case((rows, 600, 70), torch.bfloat16, "cpu")
    norm = products.Norm(case.gain, case.shift, 1e-5)
    products.product(case.wide_x, case.weight, case.bias, norm_before=norm)
    assert bytes_read(case.weight) == case.weight.nbytes
