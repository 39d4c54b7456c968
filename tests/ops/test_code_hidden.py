"""Codes of hidden states, held against the reference."""

import pytest
import torch

from multiexit_engine.ops import code_hidden
from tests.ops.backends import all_backends, implementation_or_skip


@all_backends(code_hidden)
@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (2, 16), (17, 33), (40, 768)])
def test_backend_equals_the_reference(backend, rows, size, num_terms):
    function = implementation_or_skip(code_hidden, backend)
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    hidden[0] = 0.0
    found, wanted = function(hidden, num_terms), code_hidden.reference(hidden, num_terms)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
    torch.testing.assert_close(found.norms, wanted.norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.errors, wanted.errors, rtol=1e-9, atol=1e-12)


@all_backends(code_hidden)
@pytest.mark.parametrize("num_terms", [1, 2])
def test_states_are_multiplied_by_factors_of_their_columns_first(backend, num_terms):
    function = implementation_or_skip(code_hidden, backend)
    hidden, factors = torch.randn(19, 37), torch.rand(37)
    found = function(hidden, num_terms, factors)
    for name, wanted in vars(function(hidden * factors, num_terms)).items():
        assert torch.equal(getattr(found, name), wanted)


@all_backends(code_hidden)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_what_is_no_number_has_no_bound(backend, broken):
    function = implementation_or_skip(code_hidden, backend)
    hidden = torch.randn(3, 20)
    hidden[1, 18] = broken
    for op in (function, code_hidden.reference):
        assert op(hidden).errors.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("num_terms", [1, 2])
def test_errors_are_the_distance_from_what_the_codes_stand_for(num_terms):
    hidden = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    found = code_hidden(hidden, num_terms)
    terms = (found.codes.double() - 128) * found.scales[..., None].double()
    distance = (terms.sum(1)[:, :50] - hidden.double()).norm(dim=1)
    torch.testing.assert_close(found.errors, distance, rtol=1e-6, atol=1e-12)


def test_two_terms_are_as_good_as_16_bits():
    hidden = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    step = code_hidden(hidden).scales[:, 0].double() / 254
    # no number is off by more than half a step of the second term
    assert (code_hidden(hidden, 2).errors <= 0.51 * step * 50**0.5).all()
