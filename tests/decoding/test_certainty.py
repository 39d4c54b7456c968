"""What rough logits decide is what the exact ones say."""

import pytest
import torch

from multiexit_engine.decoding.certainty import certain_rows, lone_best_tokens
from multiexit_engine.ops import LogitErrors, RoughSums

QUANTITIES = ["max_prob", "margin", "entropy", "surprise"]


def sums(near, rest, border=-0.5):
    """Of one row with some exact logits, the greatest first, and some rough ones."""
    best = near[0]
    own, other = torch.tensor(near).double() - best, torch.tensor(rest).double() - best
    numbers = [
        best,
        float(own[1]) if len(near) > 1 else -torch.inf,
        own.exp().sum(),
        (own.exp() * own).sum(),
        border if rest else -torch.inf,
        other.exp().sum(),
        (other.exp() * other).sum(),
        (2 * other).exp().sum(),
        ((2 * other).exp() * other).sum(),
        ((2 * other).exp() * other**2).sum(),
    ]
    columns = (torch.tensor([float(number)], dtype=torch.float64) for number in numbers)
    return RoughSums(torch.tensor([3]), *columns)


def errors_of(error, distance=None, slack=0.0):
    parts = error, slack, error * 1e3 if distance is None else distance
    return LogitErrors(*(torch.tensor([part], dtype=torch.float64) for part in parts))


def verdict(near, rest, errors, kind, threshold, border=-0.5):
    sure, unsure = certain_rows(sums(near, rest, border), errors, [kind], [threshold])
    return sure.item(), unsure.item()


def test_only_what_is_not_near_widens_probabilities():
    # 1 / (1 + e^-1 + 10 e^-3) is 0.536, with 10 e^-3 times 1.1 it is 0.522
    near, rest = [0.0, -1.0], [-3.0] * 10
    error = errors_of(0.0953)
    assert verdict(near, rest, error, "max_prob", 0.52) == (True, False)
    assert verdict(near, rest, error, "max_prob", 0.536) == (False, False)
    assert verdict(near, rest, error, "max_prob", 0.56) == (False, True)
    assert verdict(near, [], errors_of(5.0), "max_prob", 0.731) == (True, False)
    assert verdict(near, [], errors_of(5.0), "max_prob", 0.7312) == (False, True)


def test_errors_of_many_tokens_that_cannot_all_be_great_widen_less():
    near, rest = [0.0], [-6.0] * 4000
    wide, narrow = errors_of(0.3), errors_of(0.3, distance=2.0)
    exact = 1 / (1 + 4000 * 2.718281828**-6)
    for threshold in (exact * 0.95, exact * 1.05):
        assert verdict(near, rest, wide, "max_prob", threshold, -6.0) == (False, False)
    assert verdict(near, rest, narrow, "max_prob", exact * 0.95, -6.0) == (True, False)
    assert verdict(near, rest, narrow, "max_prob", exact * 1.05, -6.0) == (False, True)


@pytest.mark.parametrize("error", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("kind", QUANTITIES)
def test_no_logits_within_the_errors_contradict_what_is_certain(kind, error):
    generator = torch.Generator().manual_seed(int(error * 100))
    for trial in range(40):
        size = float(torch.rand(1, generator=generator)) * 6
        rest = (torch.randn(300, generator=generator) - size).clamp_max(-0.5)
        near = torch.tensor([0.0, -0.7])
        off = torch.randn(300, generator=generator)
        off *= error / off.abs().max()
        if trial % 4 == 0:
            off = torch.full((300,), error) * (-1) ** (trial // 4)
        if trial % 4 == 1:
            off = torch.where(rest > rest.median(), error, -error) * (-1) ** (trial // 4)
        errors = errors_of(error, float(off.double().norm()) * 1.000001)
        truth = torch.cat([near, rest + off]).double().log_softmax(0)
        top = truth.topk(2).values
        value = {
            "max_prob": top[0].exp(),
            "margin": top[0].exp() - top[1].exp(),
            "entropy": -(truth.exp() * truth).sum(),
            "surprise": -top[0],
        }[kind].item()
        for threshold in (value * (1 + step) for step in (-0.2, -0.02, 0.0, 0.02, 0.2)):
            found = sums(near.tolist(), rest.tolist(), float(rest.max()) + error)
            sure, unsure = certain_rows(found, errors, [kind], [threshold])
            passes = value <= threshold if kind in QUANTITIES[2:] else value >= threshold
            if threshold == value > 0:
                assert not sure and not unsure
            assert not (sure.item() and not passes) and not (unsure.item() and passes)


def test_rows_of_several_quantities_are_told_apart():
    found = sums([0.0, -1.0], [])
    both = RoughSums(*(torch.cat([part, part]) for part in found))
    errors = LogitErrors(*(torch.cat([part, part]) for part in errors_of(0.1)))
    # 0.731, of which the entropy is 0.58
    sure, unsure = certain_rows(both, errors, ["entropy", "max_prob"], [0.6, 0.8])
    assert sure.tolist() == [True, False] and unsure.tolist() == [False, True]


def test_nothing_is_certain_of_errors_without_end_or_numbers_that_are_none():
    near, rest = [0.0], [-3.0]
    for error in (torch.nan, torch.inf, 50.0):
        assert verdict(near, rest, errors_of(error), "max_prob", 0.0) == (False, False)
    assert verdict([torch.nan], rest, errors_of(0.1), "max_prob", 0.0) == (False, False)


def test_a_best_token_is_lone_where_no_other_can_reach_it():
    for border, slack, is_lone in ((-0.5, 0.4, True), (-0.5, 0.6, False), (0.1, 0.0, False)):
        found = sums([0.0], [-3.0], border)
        assert lone_best_tokens(found, errors_of(0.1, slack=slack)).tolist() == [is_lone]
    assert lone_best_tokens(sums([0.0, 0.0], []), errors_of(0.1)).all()
    assert not lone_best_tokens(sums([torch.nan], []), errors_of(0.1)).any()
    assert not lone_best_tokens(sums([0.0], [-3.0]), errors_of(0.1, slack=torch.nan)).any()
