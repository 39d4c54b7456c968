"""The rules that make codes of few bits of weights, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multiexit_engine.quantization import Quantization, dequantize, first_rows, quantize

INTEGERS = [Quantization(bits, size) for bits in (8, 4) for size in (32, 64)]
FP8 = Quantization.parse("fp8")
ALL = [*INTEGERS, FP8]
KINDS = pytest.mark.parametrize("how", ALL, ids=str)


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    size = 10.0 ** draw(st.integers(-20, 20))
    return torch.randn(rows, columns, generator=generator) * size


def groups_of(matrix, size):
    """[rows, groups, size], zeros behind the last column."""
    padding = -matrix.shape[1] % size
    return torch.nn.functional.pad(matrix, (0, padding)).view(len(matrix), -1, size)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(INTEGERS))
def test_error_is_at_most_half_a_step(matrix, how):
    found = quantize(matrix, how)
    error = groups_of((dequantize(found) - matrix).abs(), how.group_size).amax(-1)
    assert bool((error <= found.scales.float() * (0.5 + 1e-5)).all())


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(ALL))
def test_scale_is_the_largest_number_over_the_largest_code(matrix, how):
    size = how.group_of(matrix.shape[1])
    expected = groups_of(matrix, size).abs().amax(-1) / how.largest_code
    assert torch.equal(quantize(matrix, how).scales, expected.bfloat16())


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(ALL))
def test_what_was_quantized_before_stays_what_it_is(matrix, how):
    once = dequantize(quantize(matrix, how))
    assert torch.equal(dequantize(quantize(once, how)), once)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(ALL))
def test_a_negated_matrix_becomes_the_negated_numbers(matrix, how):
    assert torch.equal(dequantize(quantize(-matrix, how)), -dequantize(quantize(matrix, how)))


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(ALL))
def test_bytes_are_those_foretold(matrix, how):
    found = quantize(matrix, how)
    assert found.nbytes == how.num_bytes(*matrix.shape)
    assert found.shape == matrix.shape


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_error_of_fp8_is_at_most_a_sixteenth_of_a_number(matrix):
    found = quantize(matrix, FP8)
    error = (dequantize(found) - matrix).abs()
    # the scale is rounded to bfloat16, so that the largest number may lie behind the largest code
    bound = matrix.abs() * (1 / 16 + 1e-6) + found.scales.float() / 1024
    assert bool((error <= bound).all())


def test_each_code_of_fp8_is_the_number_that_e4m3_gives_it():
    numbers = [
        (-1) ** (code >> 7) * (2.0 ** ((code >> 3 & 15) - 7) * (1 + (code & 7) / 8)
        if code & 120 else 2.0**-6 * (code & 7) / 8)
        for code in range(256)
        if code & 127 != 127
    ]  # fmt: skip
    found = quantize(torch.tensor([numbers]), FP8)
    assert found.scales.tolist() == [[1.0]]
    assert dequantize(found).tolist() == [numbers]


@pytest.mark.parametrize("how", INTEGERS, ids=str)
def test_ties_go_to_the_even_code(how):
    step = 1 / 16
    row = torch.tensor([[how.largest_code, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]) * step
    found = dequantize(quantize(row, how)) / step
    assert found.tolist() == [[how.largest_code, 0, 2, 2, 0, -2, -2]]


@KINDS
def test_numbers_of_a_row_do_not_depend_on_other_rows(how):
    matrix = torch.randn(9000, 33, generator=torch.Generator().manual_seed(0))
    whole = dequantize(quantize(matrix, how))
    assert torch.equal(dequantize(quantize(matrix[8190:8195], how)), whole[8190:8195])


@KINDS
@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_numbers_too_small_for_a_scale_become_zeros(how, value):
    assert not dequantize(quantize(torch.full((2, 40), value), how)).any()


@KINDS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_no_scale_can_hold_are_refused(how, value):
    matrix = torch.ones(2, 40)
    matrix[1, 35] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(matrix, how)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", ALL[0]),
        ("int4", ALL[2]),
        ("int4-g64", ALL[3]),
        ("int8-g32", ALL[0]),
        ("fp8", Quantization(8, 0, is_float=True)),
    ],  # fmt: skip
)
def test_names_are_read(name, expected):
    assert Quantization.parse(name) == expected


@pytest.mark.parametrize("name", ["int3", "int8-g16", "INT8", "", "awq"])
def test_unknown_names_are_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match="fp8, int4, int4-g32, int4-g64, int8"):
        Quantization.parse(name)


@KINDS
def test_first_rows_stand_for_the_first_rows(how):
    found = quantize(torch.randn(9, 70), how)
    part = first_rows(found, 4)
    assert torch.equal(dequantize(part, torch.float32), dequantize(found, torch.float32)[:4])
    assert part.codes.data_ptr() == found.codes.data_ptr(), "nothing is copied"
