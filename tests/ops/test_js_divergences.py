import math

import pytest
import torch

from multiexit_engine.ops import js_divergences
from tests.ops.backends import implementation_or_skip

INF = math.inf


def logits(candidates, rows, vocab, spread=3.0):
    generator = torch.Generator().manual_seed(8)
    values = torch.randn(candidates + 1, rows, vocab, generator=generator) * spread
    return values[0], values[1:]


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def definition(mature, premature, form):
    """The formula word by word on probabilities, in float64."""
    p, q = mature.double().softmax(-1), premature.double().softmax(-1)
    m = (p + q) / 2
    if form == "reference":
        return (kl(m, p) + kl(m, q)) / 2 / p.shape[-1]
    return (kl(p, m) + kl(q, m)) / 2


BACKENDS = pytest.mark.parametrize("backend", ["reference", *js_divergences.backends])
FORMS = pytest.mark.parametrize("form", ["exact", "reference"])


@FORMS
@pytest.mark.parametrize("vocab", [1, 7, 63, 1031])
@pytest.mark.parametrize("candidates", [1, 5])
def test_equals_the_definition(candidates, vocab, form):
    mature, premature = (x.double() for x in logits(candidates, 3, vocab))
    actual = js_divergences.reference(mature, premature, form)
    torch.testing.assert_close(actual, definition(mature, premature, form), rtol=1e-9, atol=1e-12)


@FORMS
@BACKENDS
@pytest.mark.parametrize("vocab", [1, 7, 511, 4999])
@pytest.mark.parametrize("spread", [0.3, 3.0, 20.0])
def test_float32_is_within_rounding_of_the_truth(spread, vocab, backend, form):
    mature, premature = logits(4, 5, vocab, spread)
    actual = implementation_or_skip(js_divergences, backend)(mature, premature, form)
    assert actual.dtype == torch.float32
    truth = definition(mature, premature, form)
    torch.testing.assert_close(actual.double(), truth, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [100, 1031])
def test_reference_is_what_transformers_4_55_computes(vocab):
    mature, premature = logits(4, 1, vocab)
    m = 0.5 * (mature.softmax(-1)[None] + premature.softmax(-1))
    kl_div = torch.nn.functional.kl_div
    first = kl_div(mature.log_softmax(-1)[None], m, reduction="none").mean(-1)
    second = kl_div(premature.log_softmax(-1), m, reduction="none").mean(-1)
    actual = js_divergences.reference(mature, premature, "reference")
    torch.testing.assert_close(actual, 0.5 * (first + second), rtol=1e-5, atol=1e-9)


@BACKENDS
def test_disjoint_distributions_differ_by_log_2(backend):
    mature, premature = torch.tensor([[90.0, -90.0]]), torch.tensor([[[-90.0, 90.0]]])
    actual = implementation_or_skip(js_divergences, backend)(mature, premature, "exact")
    torch.testing.assert_close(actual, torch.tensor([[math.log(2)]]))


@FORMS
@BACKENDS
def test_equal_distributions_do_not_differ(backend, form):
    mature, _ = logits(1, 2, 63)
    actual = implementation_or_skip(js_divergences, backend)(
        mature, torch.stack([mature, mature + 5.0]), form
    )
    torch.testing.assert_close(actual, torch.zeros(2, 2), rtol=0, atol=1e-6)


@FORMS
@BACKENDS
def test_a_token_that_both_rule_out_adds_nothing(backend, form):
    mature, premature = logits(3, 2, 63)
    expected = definition(mature, premature, form)
    if form == "reference":
        expected = expected * 63 / 64
    off = torch.full((1,), -INF)
    actual = implementation_or_skip(js_divergences, backend)(
        torch.cat([mature, off.expand(2, 1)], -1),
        torch.cat([premature, off.expand(3, 2, 1)], -1),
        form,
    )
    torch.testing.assert_close(actual.double(), expected, rtol=3e-5, atol=1e-7)


@BACKENDS
def test_the_exact_divergence_stays_finite_where_one_rules_a_token_out(backend):
    mature, premature = torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[[0.0, 1.0, -INF]]])
    assert (
        0
        < implementation_or_skip(js_divergences, backend)(mature, premature, "exact").item()
        < math.log(2)
    )


@FORMS
def test_a_row_gives_the_same_bits_in_any_company(form):
    mature, premature = logits(4, 9, 1031)
    together = js_divergences(mature, premature, form)
    for row in range(9):
        alone = js_divergences(mature[row : row + 1], premature[:, row : row + 1], form)
        assert torch.equal(alone, together[:, row : row + 1])


def test_bfloat16_logits_are_compared_in_float32():
    mature, premature = (x.bfloat16() for x in logits(2, 3, 100))
    actual = js_divergences(mature, premature, "exact")
    assert torch.equal(actual, js_divergences(mature.float(), premature.float(), "exact"))
