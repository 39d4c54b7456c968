import torch
from scipy.stats import chisquare

from multiexit_engine.decoding.sampler import TokenRow, choose_tokens, token_logprobs
from multiexit_engine.decoding.warpers import warp_scores
from multiexit_engine.ops import contrast_logits
from multiexit_engine.params import SamplingParams

VOCAB = 12
DRAWS = 4000


def random_scores(rows, vocab=VOCAB, seed=0):
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def row(seed=0, num_output=0, **params):
    return TokenRow(SamplingParams(**params), [1], [0] * num_output, seed)


def assert_sampled_from(scores, params, probs):
    """One token for each of DRAWS seeds, all in one batch."""
    rows = [TokenRow(params, [1], [], seed) for seed in range(DRAWS)]
    counts = choose_tokens(scores.expand(DRAWS, -1), rows).bincount(minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0].double()
    expected *= DRAWS / expected.sum()
    assert chisquare(counts[probs > 0].numpy(), expected.numpy()).pvalue > 1e-3


def test_greedy_rows_take_the_best_token():
    scores = random_scores(5)
    assert torch.equal(choose_tokens(scores, [row()] * 5), scores.argmax(-1))


def test_greedy_rows_take_the_lowest_of_equal_tokens():
    scores = torch.zeros(1, VOCAB)
    scores[0, [4, 9]] = 1.0
    assert choose_tokens(scores, [row()]).tolist() == [4]


def test_scores_are_processed():
    scores = torch.zeros(2, VOCAB)
    rows = [row(logit_bias={7: 1.0}), row(logit_bias={5: 99.0}, temperature=1.0)]
    assert choose_tokens(scores, rows).tolist() == [7, 5]


def test_samples_the_softmax():
    scores = random_scores(1)[0]
    params = SamplingParams(temperature=1.0, top_k=0)
    assert_sampled_from(scores, params, scores.softmax(-1))


def test_samples_what_the_warpers_leave():
    scores = random_scores(1)[0]
    params = SamplingParams(temperature=1.5, top_k=8, top_p=0.9)
    assert_sampled_from(scores, params, warp_scores(scores[None], [params])[0].softmax(-1))


def test_samples_a_contrasted_distribution():
    upper, lower = random_scores(2)
    scores = contrast_logits(upper[None], lower[None], torch.tensor([0.1]))[0]
    assert_sampled_from(scores, SamplingParams(temperature=1.0, top_k=0), scores.exp())


def test_equal_seeds_give_equal_tokens():
    scores = random_scores(50)
    rows = [row(seed=3, num_output=i, temperature=1.0) for i in range(50)]
    assert torch.equal(choose_tokens(scores, rows), choose_tokens(scores, rows))


def test_seed_and_number_of_output_tokens_change_the_draw():
    scores = torch.zeros(1, 1000).expand(3, -1)
    sampling = {"temperature": 1.0, "top_k": 0}
    rows = [row(3, 0, **sampling), row(4, 0, **sampling), row(3, 1, **sampling)]
    assert len(set(choose_tokens(scores, rows).tolist())) == 3


def test_a_row_does_not_depend_on_the_others():
    rows = [
        row(),
        row(5, 2, temperature=1.0),
        row(repetition_penalty=1.7),
        row(5, 2, temperature=0.7, top_p=0.9),
        row(9, 0, temperature=1.0, top_k=0, min_p=0.05),
        row(2**63 - 1, 7, temperature=2.0, top_k=3, typical_p=0.5),
    ]
    scores = random_scores(6, vocab=1031)
    together = choose_tokens(scores, rows)
    for index, item in enumerate(rows):
        assert choose_tokens(scores[index : index + 1], [item]) == together[index]


def test_log_probabilities_of_the_best_tokens():
    scores, tokens = random_scores(3), torch.tensor([0, 5, 11])
    found = token_logprobs(scores, tokens, 4)
    expected = scores.double().log_softmax(-1)
    order = expected.argsort(-1, descending=True)
    torch.testing.assert_close(found.values.double(), expected.gather(1, order[:, :4]))
    assert torch.equal(found.ids, order[:, :4])
    torch.testing.assert_close(found.chosen.double(), expected[torch.arange(3), tokens])
    assert torch.equal(found.ranks, (order == tokens[:, None]).int().argmax(-1) + 1)


def test_of_equal_alternatives_the_lowest_come_first_however_many_are_asked_for():
    scores = torch.randint(-2, 2, (3, 500), generator=torch.Generator().manual_seed(1)).float()
    scores[1] = -torch.inf
    scores[1, 7:10] = 1.0
    whole = scores.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    for count in (1, 2, 5, 130, 499, 500):
        found = token_logprobs(scores, torch.tensor([0, 7, 1]), count)
        assert torch.equal(found.ids, whole.indices[:, :count])
        assert torch.equal(found.values, whole.values[:, :count])


def test_alternatives_of_scores_that_are_no_numbers_are_tokens_all_the_same():
    found = token_logprobs(torch.full((1, 9), torch.nan), torch.tensor([0]), 3)
    assert found.ids.max() < 9


def test_no_alternatives_and_more_than_there_are():
    scores, tokens = random_scores(2), torch.tensor([3, 4])
    assert token_logprobs(scores, tokens, 0).values.shape == (2, 0)
    assert token_logprobs(scores, tokens, 99).ids.shape == (2, VOCAB)
