import math

import torch

from multiexit_engine.train.measure import contrast_log_probs, contrast_perplexity, measure_exits
from multiexit_engine.train.samples import exit_scores, greedy_continuations, repetition
from tests.train.tiny import CAST, tiny_network

BLOCKS = torch.randint(1, 67, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_loss() -> None:
    network = tiny_network(CAST, (2, 4))
    figures = measure_exits(network, BLOCKS, bytes_per_token=2.0, rows_per_batch=2)
    loss = float(network(BLOCKS)[0])
    assert math.isclose(figures[0].perplexity, math.exp(loss), rel_tol=1e-5)
    assert math.isclose(figures[0].bits_per_byte, loss / math.log(2) / 2.0, rel_tol=1e-5)


def test_the_last_exit_always_agrees_with_itself() -> None:
    figures = measure_exits(tiny_network(CAST, (2, 4)), BLOCKS, bytes_per_token=2.0)
    assert figures[-1].agreement == 1.0
    assert figures[0].agreement < 1.0


def test_contrasted_log_probs_follow_the_formula_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(2)
    upper = torch.randn(63, dtype=torch.float64, generator=generator) * 2
    lower = torch.randn(63, dtype=torch.float64, generator=generator) * 2
    p, q = upper.softmax(dim=0), lower.softmax(dim=0)
    inside = p >= 0.1 * p.max()
    scores = torch.where(inside, (p / q).log(), -torch.inf)
    expected = torch.where(inside, p[inside].sum() * scores.softmax(dim=0), p).log()
    torch.testing.assert_close(contrast_log_probs(upper, lower, 0.1), expected.float())


def test_contrasted_perplexity_is_finite() -> None:
    perplexity = contrast_perplexity(tiny_network(CAST, (2, 4)), BLOCKS, 4, 2)
    assert math.isfinite(perplexity)


@torch.no_grad()
def test_greedy_continuations_take_the_best_token_each_time() -> None:
    network = tiny_network(CAST, (2, 4))
    ids = greedy_continuations(network, BLOCKS[:, :5], exit_scores(2), num_tokens=3)
    logits = dict(network.exit_logits(ids))[2]
    assert torch.equal(ids[:, 5:], logits[:, 4:-1].argmax(dim=-1))


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    assert repetition(torch.tensor([[1, 2, 3, 1, 2, 3]])) == 0.25
