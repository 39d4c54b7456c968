import math

import pytest
import torch
from scipy.stats import chisquare

from multiexit_engine.ops import contrast_logits, gumbel_noise, sample_tokens, sampling
from tests.ops.backends import all_backends, device_for, implementation_or_skip

DRAWS = 20_000
SEEDS = pytest.mark.parametrize("seed", [0, 12345, 2**62 + 1])


def scores_of(rows, vocab):
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


def drawn(scores, seed):
    """How often each token is drawn at DRAWS consecutive positions."""
    tokens = sample_tokens.reference(
        scores.expand(DRAWS, -1), torch.full((DRAWS,), seed), torch.arange(DRAWS)
    )
    return tokens.bincount(minlength=scores.shape[0])


def assert_drawn_from(counts, probs):
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    expected = probs[possible].double()
    expected *= DRAWS / expected.sum()
    assert chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-3


@SEEDS
def test_draws_from_the_softmax(seed):
    scores = scores_of(1, 12)[0]
    assert_drawn_from(drawn(scores, seed), scores.softmax(-1))


@SEEDS
def test_draws_from_a_contrasted_distribution(seed):
    upper, lower = scores_of(2, 12)
    scores = contrast_logits.reference(upper[None], lower[None], torch.tensor([0.1]))[0]
    assert_drawn_from(drawn(scores, seed), scores.exp())


@SEEDS
def test_draws_from_what_is_left(seed):
    scores = scores_of(1, 100)[0]
    scores[torch.arange(100) % 20 != 3] = -math.inf
    assert_drawn_from(drawn(scores, seed), scores.softmax(-1))


def test_different_seeds_draw_independently():
    scores = torch.zeros(4).expand(DRAWS, -1)
    tokens = sample_tokens.reference(scores, torch.arange(DRAWS), torch.zeros(DRAWS).long())
    assert_drawn_from(tokens.bincount(minlength=4), torch.full((4,), 0.25))


def test_the_only_token_left_is_taken():
    scores = torch.full((50, 7), -math.inf)
    scores[:, 4] = -1000.0
    tokens = sample_tokens.reference(scores, torch.arange(50), torch.arange(50))
    assert tokens.tolist() == [4] * 50


def test_a_row_without_tokens_gives_token_0():
    scores = torch.full((1, 7), -math.inf)
    assert sample_tokens.reference(scores, torch.tensor([1]), torch.tensor([1])).tolist() == [0]


def test_is_the_argmax_of_scores_and_noise(monkeypatch):
    scores, seeds, positions = scores_of(9, 1031), torch.arange(9), torch.arange(9) * 3
    expected = (scores + gumbel_noise.reference(seeds, positions, 1031)).argmax(-1)
    for share in (0.0, 2.0):
        monkeypatch.setattr(sampling, "SPARSE_SHARE", share)
        assert torch.equal(sample_tokens.reference(scores, seeds, positions), expected)


def test_a_row_does_not_depend_on_the_others():
    scores, seeds, positions = scores_of(9, 63), torch.arange(9) + 50, torch.arange(9)
    together = sample_tokens.reference(scores, seeds, positions)
    for row in range(9):
        one = slice(row, row + 1)
        assert sample_tokens.reference(scores[one], seeds[one], positions[one]) == together[row]


def test_scores_are_left_alone():
    scores = scores_of(2, 20)
    scores[:, :18] = -math.inf
    before = scores.clone()
    sample_tokens.reference(scores, torch.arange(2), torch.arange(2))
    assert torch.equal(scores, before)


@all_backends(sample_tokens)
def test_backend_matches_reference(backend):
    implementation = implementation_or_skip(sample_tokens, backend)
    device = device_for(sample_tokens, backend)
    args = scores_of(9, 1031), torch.arange(9), torch.arange(9) * 3
    actual = implementation(*(x.to(device) for x in args))
    assert actual.tolist() == sample_tokens.reference(*args).tolist()
