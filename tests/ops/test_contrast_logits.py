import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multiexit_engine.ops import contrast_logits
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

INF = math.inf
ALL_TOKENS = 0


def logits(rows, vocab, spread=3.0, seed=42):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, rows, vocab, generator=generator) * spread).unbind(0)


def contrast(upper, lower, alpha=0.1, least=1):
    upper, lower = torch.as_tensor([upper]).float(), torch.as_tensor([lower]).float()
    return contrast_logits.reference(
        upper, lower, torch.tensor([float(alpha)]), torch.tensor([least])
    )[0]


def definition(upper, lower, alpha, least):
    """The formula word by word, on one float64 row of finite logits."""
    p, q = upper.softmax(-1), lower.softmax(-1)
    threshold = min(alpha * p.max(), p.sort(descending=True).values[least - 1])
    candidates = p >= threshold
    shares = (p.log() - q.log())[candidates].softmax(-1)
    out = p.log()
    out[candidates] = (p[candidates].sum() * shares).log()
    return out


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("least", [1, 2, 7])
@pytest.mark.parametrize("vocab", [7, 63, 1031])
def test_equals_the_definition(vocab, least, alpha):
    upper, lower = (x.double() for x in logits(3, vocab))
    actual = contrast_logits.reference(
        upper, lower, torch.full((3,), alpha), torch.full((3,), least)
    )
    alpha32 = torch.tensor(alpha).item()
    rows = zip(upper, lower, strict=True)
    expected = torch.stack([definition(u, low, alpha32, least) for u, low in rows])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_alpha_of_zero_and_less_takes_all_tokens(alpha):
    upper, lower = [3.0, 0.0, -50.0], [1.0, 1.0, -90.0]
    expected = torch.tensor([2.0, -1.0, 40.0]).log_softmax(-1)
    torch.testing.assert_close(contrast(upper, lower, alpha), expected)


@pytest.mark.parametrize("alpha", [1.0, 7.5])
def test_alpha_of_one_and_more_keeps_the_best_token_and_its_ties(alpha):
    actual = contrast([2.0, 2.0, 1.9], [0.0, 1.0, -9.0], alpha).exp()
    p = torch.tensor([2.0, 2.0, 1.9]).softmax(-1)
    shares = torch.tensor([2.0, 1.0]).softmax(-1) * (p[0] + p[1])
    torch.testing.assert_close(actual, torch.cat([shares, p[2:]]))


@pytest.mark.parametrize("least", [0, 4, 1000])
def test_no_count_and_more_than_the_vocabulary_take_all_tokens(least):
    expected = torch.tensor([2.0, -1.0, 40.0]).log_softmax(-1)
    actual = contrast([3.0, 0.0, -50.0], [1.0, 1.0, -90.0], 1.0, least)
    torch.testing.assert_close(actual, expected)


def test_rows_have_thresholds_and_counts_of_their_own():
    upper, lower = logits(4, 50)
    alpha, least = torch.tensor([0.1, 0.9, 0.0, 1.0]), torch.tensor([1, 9, 1, 60])
    together = contrast_logits.reference(upper, lower, alpha, least)
    for row in range(4):
        one = slice(row, row + 1)
        alone = contrast_logits.reference(upper[one], lower[one], alpha[one], least[one])
        assert torch.equal(together[one], alone)


def test_equal_exits_make_the_candidates_equally_likely():
    actual = contrast([2.0, 1.0, -9.0], [2.0, 1.0, -9.0]).exp()
    assert actual[0] == actual[1]


def test_underflow_of_the_lower_exit_gives_no_nan():
    upper, lower = logits(2, 100, spread=200.0)
    assert not contrast_logits.reference(upper, lower, torch.full((2,), 0.1)).isnan().any()


def test_a_candidate_that_the_lower_exit_forbids_takes_all_mass_of_the_candidates():
    actual = contrast([2.0, 2.0, -9.0], [0.0, -INF, 0.0]).exp()
    p = torch.tensor([2.0, 2.0, -9.0]).softmax(-1)
    torch.testing.assert_close(actual, torch.stack([p[0] * 0, p[0] + p[1], p[2]]))


def test_candidates_that_the_lower_exit_is_sure_of_get_none():
    actual = contrast([2.0, 2.0, -9.0], [0.0, INF, 0.0]).exp()
    p = torch.tensor([2.0, 2.0, -9.0]).softmax(-1)
    torch.testing.assert_close(actual, torch.stack([p[0] + p[1], p[1] * 0, p[2]]))


def test_equal_infinities_of_the_lower_exit_change_nothing():
    for value in (INF, -INF):
        expected = torch.tensor([2.0, 1.0, -9.0]).log_softmax(-1)
        torch.testing.assert_close(contrast([2.0, 1.0, -9.0], [value] * 3), expected)


def test_a_masked_token_stays_masked_whatever_the_lower_exit_says():
    for value in (-INF, 0.0, INF):
        assert contrast([2.0, 1.0, -INF], [0.0, 0.0, value], ALL_TOKENS)[2] == -INF


def test_a_row_of_masked_tokens_stays_as_it_is():
    assert contrast([-INF] * 3, [0.0] * 3).tolist() == [-INF] * 3


def test_an_infinite_logit_takes_all_mass():
    assert contrast([INF, 1.0, 2.0], [0.0, 0.0, 0.0]).exp().tolist() == [1.0, 0.0, 0.0]


ANY_LOGIT = st.one_of(
    st.floats(-200, 200, width=32), st.sampled_from([-INF, INF, 0.0, 3e38, -3e38])
)


@settings(deadline=None, max_examples=300)
@given(
    rows=st.integers(1, 9).flatmap(
        lambda n: st.tuples(*[st.lists(ANY_LOGIT, min_size=n, max_size=n)] * 2)
    ),
    alpha=st.floats(-1, 2, width=32),
    least=st.integers(0, 12),
)
def test_never_nan(rows, alpha, least):
    assert not contrast(*rows, alpha, least).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    upper, lower = (x.to(dtype) for x in logits(3, 100))
    actual = contrast_logits.reference(upper, lower, torch.full((3,), 0.1))
    wide = contrast_logits.reference(upper.float(), lower.float(), torch.full((3,), 0.1))
    assert actual.dtype == torch.float32 and torch.equal(actual, wide)


def test_rows_are_distributions():
    upper, lower = logits(4, 50)
    total = contrast_logits.reference(upper, lower, torch.full((4,), 0.1)).logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros(4), atol=1e-5, rtol=0)


def test_inputs_are_left_alone():
    upper, lower = logits(2, 9)
    copies = upper.clone(), lower.clone()
    contrast_logits.reference(upper, lower, torch.full((2,), 0.1), torch.ones(2).long())
    assert torch.equal(upper, copies[0]) and torch.equal(lower, copies[1])


@all_backends(contrast_logits)
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (3, 100), (2, 1031)])
def test_backend_matches_reference(backend, rows, vocab, alpha):
    implementation = implementation_or_skip(contrast_logits, backend)
    device = device_for(contrast_logits, backend)
    upper, lower = (x.to(device) for x in logits(rows, vocab))
    args = (upper, lower, torch.full((rows,), alpha, device=device))
    assert_as_good_as_reference(contrast_logits, implementation(*args), args, tolerance=1e-5)


@pytest.mark.parametrize("least", [None, 3])
def test_the_plausible_tokens_are_counted(least):
    upper, lower = logits(4, 63)
    alpha = torch.tensor([0.1, 1.0, 1e-3, 0.0])
    counts = torch.full((4,), -1, dtype=torch.int32)
    least = None if least is None else torch.full((4,), least)
    contrast_logits.reference(upper, lower, alpha, least, counts)
    p = upper.softmax(-1)
    threshold = alpha[:, None] * p.amax(-1, keepdim=True)
    if least is not None:
        threshold = torch.minimum(threshold, p.topk(3).values[:, 2:])
    assert counts.tolist() == (p >= threshold * (1 - 1e-6)).sum(-1).tolist()
