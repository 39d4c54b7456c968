import torch

from multiexit_engine.decoding.draws import Draws, tokens_in_order
from multiexit_engine.ops import gumbel_noise, sample_tokens


def drawn(temperatures):
    rows = len(temperatures)
    return Draws(torch.tensor(temperatures), torch.arange(rows) + 7, torch.arange(rows) * 3)


def test_the_best_tokens_of_a_draw_are_its_largest_tokens_in_order():
    torch.manual_seed(0)
    scores, draws = torch.randn(5, 97), drawn([0.0, 1.0, 0.5, 0.0, 2.0])
    heat = torch.where(draws.temperature > 0, draws.temperature, 1.0)
    noise = gumbel_noise(draws.seeds, draws.positions, 97) * (draws.temperature > 0)[:, None]
    keys = scores / heat[:, None] + noise
    assert torch.equal(tokens_in_order(scores, draws, 4), keys.topk(4, -1).indices)


def test_the_first_of_the_best_tokens_is_what_is_drawn():
    torch.manual_seed(1)
    scores, draws = torch.randn(3, 50), drawn([1.0, 1.0, 1.0])
    expected = sample_tokens(scores, draws.seeds, draws.positions)
    assert torch.equal(tokens_in_order(scores, draws, 2)[:, 0], expected)


def test_greedy_rows_take_their_best_scores():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert tokens_in_order(scores, drawn([0.0]), 3).tolist() == [[1, 3, 2]]
