import math

import pytest
import torch

from multiexit_engine.ops import relative_top_logits

INF = math.inf


def logits(rows, vocab, spread=3.0):
    generator = torch.Generator().manual_seed(4)
    return (torch.randn(2, rows, vocab, generator=generator) * spread).unbind(0)


def scores(mature, premature, top=0.1):
    mature, premature = torch.tensor([mature]), torch.tensor([premature])
    return relative_top_logits.reference(mature, premature, torch.tensor([top]))[0]


def definition(mature, premature, top):
    """The formula word by word on probabilities, in float64."""
    p, q = mature.double().softmax(-1), premature.double().softmax(-1)
    plausible = p >= top.double()[:, None] * p.amax(-1, keepdim=True)
    return torch.where(plausible, (p / q).log(), -INF)


@pytest.mark.parametrize("vocab", [1, 7, 63, 1031])
def test_equals_the_definition_for_each_rows_own_threshold(vocab):
    mature, premature = logits(3, vocab)
    top = torch.tensor([0.1, 0.9, 1e-3])
    actual = relative_top_logits.reference(mature, premature, top)
    assert actual.dtype == torch.float32
    truth = definition(mature, premature, top)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_threshold_of_zero_keeps_every_token():
    mature, premature = [3.0, 0.0, -50.0], [1.0, 1.0, -90.0]
    expected = torch.tensor(mature).log_softmax(-1) - torch.tensor(premature).log_softmax(-1)
    torch.testing.assert_close(scores(mature, premature, 0.0), expected)


def test_a_threshold_of_one_keeps_the_best_token_and_its_ties():
    kept = scores([2.0, 1.9, 2.0], [0.0, 0.0, 0.0], 1.0).isfinite()
    assert kept.tolist() == [True, False, True]


def test_a_token_that_the_mature_head_rules_out_stays_out():
    assert scores([1.0, -INF], [0.0, -INF], 0.0)[1] == -INF


def test_a_token_that_the_premature_head_rules_out_wins_and_is_no_nan():
    found = scores([1.0, 1.0, 0.0], [0.0, -INF, 0.0], 0.1)
    assert found.argmax() == 1 and found.isfinite().all()
    assert not found.log_softmax(-1).isnan().any()


def test_underflow_of_the_premature_head_gives_no_nan():
    found = scores([0.0, 1.0], [500.0, -500.0])
    torch.testing.assert_close(found[1] - found[0], torch.tensor(1001.0))


def test_a_row_gives_the_same_bits_in_any_company():
    mature, premature = logits(9, 1031)
    top = torch.full((9,), 0.1)
    together = relative_top_logits(mature, premature, top)
    for row in range(9):
        own = slice(row, row + 1)
        assert torch.equal(
            relative_top_logits(mature[own], premature[own], top[own]), together[own]
        )
