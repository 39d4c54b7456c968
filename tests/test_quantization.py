"""The rule that makes small integers of weights, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multiexit_engine.quantization import Quantization, dequantize, first_rows, quantize

ALL = [Quantization(bits, size) for bits in (8, 4) for size in (32, 64)]
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
@given(matrices(), st.sampled_from(ALL))
def test_error_is_at_most_half_a_step(matrix, how):
    found = quantize(matrix, how)
    error = groups_of((dequantize(found) - matrix).abs(), how.group_size).amax(-1)
    assert bool((error <= found.scales.float() * (0.5 + 1e-5)).all())


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(ALL))
def test_scale_is_the_largest_number_over_the_largest_code(matrix, how):
    expected = groups_of(matrix, how.group_size).abs().amax(-1) / how.largest_code
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


@KINDS
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
    [("int8", ALL[0]), ("int4", ALL[2]), ("int4-g64", ALL[3]), ("int8-g32", ALL[0])],
)
def test_names_are_read(name, expected):
    assert Quantization.parse(name) == expected


@pytest.mark.parametrize("name", ["int3", "int8-g16", "INT8", "", "awq"])
def test_unknown_names_are_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match="int4, int4-g32, int4-g64, int8"):
        Quantization.parse(name)


@KINDS
def test_first_rows_stand_for_the_first_rows(how):
    found = quantize(torch.randn(9, 70), how)
    part = first_rows(found, 4)
    assert torch.equal(dequantize(part, torch.float32), dequantize(found, torch.float32)[:4])
    assert part.codes.data_ptr() == found.codes.data_ptr(), "nothing is copied"
