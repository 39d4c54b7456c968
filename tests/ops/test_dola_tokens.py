"""A DoLa token is the choice among scores against the candidate that differs most."""

import math

import pytest
import torch

from multiexit_engine.ops import dola_tokens, gumbel_noise, js_divergences
from tests.ops.backends import implementation_or_skip

INF = math.inf
BACKENDS = pytest.mark.parametrize("backend", ["reference", *dola_tokens.backends])


def operands(candidates, rows, vocab, spread=3.0, top=0.1):
    generator = torch.Generator().manual_seed(vocab + rows)
    logits = torch.randn(1 + candidates, rows, vocab, generator=generator) * spread
    tops = torch.full((rows,), top)
    seeds = torch.arange(rows) * 7 - 3
    return logits[0], logits[1:], tops, seeds, torch.arange(rows) + 5


def run(backend, own, temperature=0.0, form="exact"):
    mature, premature, tops, seeds, positions = own
    places = torch.full_like(seeds, -7)
    heat = torch.full((len(seeds),), temperature)
    function = implementation_or_skip(dola_tokens, backend)
    tokens, log_probs = function(mature, premature, tops, form, heat, seeds, positions, places)
    return tokens, log_probs, places


def truth(own, form):
    """[rows, vocab] float64 log-probabilities, and the places of the candidates."""
    mature, premature, tops = (x.double() for x in own[:3])
    places = js_divergences.reference(mature, premature, form).argmax(0)
    p = mature.log_softmax(-1)
    q = premature[places, torch.arange(len(places))].log_softmax(-1)
    is_plausible = p >= p.amax(-1, keepdim=True) + tops.log()[:, None]
    return torch.where(is_plausible, p - q, -INF).log_softmax(-1), places


@BACKENDS
@pytest.mark.parametrize("form", ["exact", "reference"])
@pytest.mark.parametrize(
    ("candidates", "rows", "vocab"), [(1, 1, 7), (3, 2, 511), (5, 3, 4999), (2, 4, 1), (1, 2, 6001)]
)
def test_greedy_rows_take_the_best_score(backend, candidates, rows, vocab, form):
    own = operands(candidates, rows, vocab)
    tokens, log_probs, places = run(backend, own, form=form)
    log_p, expected = truth(own, form)
    assert places.tolist() == (expected.tolist() if candidates > 1 else [0] * rows)
    assert tokens.tolist() == log_p.argmax(-1).tolist()
    torch.testing.assert_close(log_probs.double(), log_p.amax(-1), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_sampled_rows_take_the_best_noisy_score(backend):
    own = operands(4, 6, 4999, spread=0.5)
    tokens, log_probs, _ = run(backend, own, temperature=0.7)
    log_p, _ = truth(own, "exact")
    noisy = log_p / 0.7 + gumbel_noise(*own[3:], 4999)
    assert tokens.tolist() == noisy.argmax(-1).tolist()
    chosen = log_p.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), chosen, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_of_equals_the_first_candidate_and_the_lowest_token(backend):
    mature, premature, *rest = operands(2, 1, 600)
    mature[0, [3, 599]] = 30.0
    premature[:, 0, [3, 599]] = 1.0
    premature[1] = premature[0]
    tokens, log_probs, places = run(backend, (mature, premature, *rest))
    assert (tokens.item(), places.item()) == (3, 0)
    assert log_probs.item() == pytest.approx(math.log(0.5))


@BACKENDS
def test_no_number_gives_none_in_its_own_row_alone(backend):
    own = operands(3, 4, 4999)
    own[0][1, 4998] = math.nan
    own[1][2, 2, 5] = math.nan
    _, log_probs, _ = run(backend, own)
    assert log_probs.isnan().tolist() == [False, True, True, False]


@BACKENDS
def test_infinite_logits_rule_out_or_win(backend):
    mature, premature, *rest = operands(1, 2, 600)
    mature[0, :500] = -INF
    mature[1, 77] = INF
    premature[0, 0, 550] = -INF
    mature[0, 550] = mature[0].max()
    tokens, log_probs, _ = run(backend, (mature, premature, *rest))
    assert tokens.tolist() == [550, 77]
    assert log_probs.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@BACKENDS
def test_memory_around_the_logits_is_not_read(backend):
    own = operands(3, 2, 4999)
    around = []
    for logits in own[:2]:
        memory = torch.full((logits.numel() + 128,), math.nan)
        memory[64:-64] = logits.flatten()
        around.append(memory[64:-64].view_as(logits))
    found = run(backend, (*around, *own[2:]), 0.9)
    assert all(torch.equal(a, b) for a, b in zip(found, run(backend, own, 0.9), strict=True))


def test_a_row_gives_the_same_bits_in_any_company():
    own = operands(3, 9, 1031)
    together = run("cpu", own, 0.5)
    for row in (0, 4, 8):
        rows = slice(row, row + 1)
        alone = run("cpu", (own[0][rows], own[1][:, rows], *(x[rows] for x in own[2:])), 0.5)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
