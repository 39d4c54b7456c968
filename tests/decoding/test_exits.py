import pytest
import torch

from multiexit_engine.decoding.exits import mode_scores
from multiexit_engine.decoding.plan import plan_exits
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.ops import contrast_logits
from multiexit_engine.params import Contrast, Exit, Original
from tests.decoding.test_plan import config

VOCAB, HIDDEN = 11, 4


class Heads:
    """Every layer has a matrix of its own; hidden states are doubled in place of a norm."""

    def __init__(self, bias=None):
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.randn(10, VOCAB, HIDDEN, generator=generator)
        self.bias = bias

    def operands(self, head, hidden):
        return HeadOperands(2 * hidden, self.weights[head.layer + head.is_original], self.bias)

    def logits(self, layer, hidden, is_original=False):
        logits = 2 * hidden @ self.weights[layer + is_original].T
        return logits if self.bias is None else logits + self.bias


def states(num_rows):
    """Hidden state of every row after every layer: [layers + 1, rows, hidden]."""
    return torch.randn(9, num_rows, HIDDEN, generator=torch.Generator().manual_seed(7))


def scores_of(modes, heads, hidden=None):
    plan = plan_exits(modes, config())
    hidden = states(len(modes)) if hidden is None else hidden
    taps = {layer: hidden[layer, list(rows)] for layer, rows in plan.rows_at.items()}
    return mode_scores(plan, taps, heads)


def test_every_row_gets_the_scores_of_its_own_mode():
    heads = Heads()
    modes = [Original(), Contrast(6, 2), Exit(6), Contrast("original", 6, alpha=0.5), Exit(2)]
    scores, failures = scores_of(modes, heads)
    hidden = states(5)
    original = heads.logits(8, hidden[8], is_original=True)
    six, two = heads.logits(6, hidden[6]), heads.logits(2, hidden[2])
    contrast = contrast_logits(
        torch.stack([six[1], original[3]]),
        torch.stack([two[1], six[3]]),
        torch.tensor([0.1, 0.5]),
        torch.tensor([1, 1]),
    )
    expected = torch.stack([original[0], contrast[0], six[2], contrast[1], two[4]])
    torch.testing.assert_close(scores, expected)
    assert scores.dtype == torch.float32 and failures == {}


def test_least_numbers_of_candidates_are_per_row():
    heads = Heads()
    modes = [Contrast(6, 2, alpha=1.0), Contrast(6, 2, alpha=1.0, min_candidates=5)]
    hidden = states(2)
    expected = contrast_logits(
        heads.logits(6, hidden[6]),
        heads.logits(2, hidden[2]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([1, 5]),
    )
    torch.testing.assert_close(scores_of(modes, heads)[0], expected)


def test_biases_of_the_heads_count():
    heads = Heads(bias=torch.linspace(-2, 2, VOCAB))
    hidden = states(2)
    six, two = heads.logits(6, hidden[6]), heads.logits(2, hidden[2])
    scores, _ = scores_of([Exit(6), Contrast(6, 2)], heads)
    expected = contrast_logits(six[1:], two[1:], torch.tensor([0.1]))
    torch.testing.assert_close(scores, torch.cat([six[:1], expected]))


def test_rows_do_not_depend_on_their_mates():
    heads, hidden = Heads(), states(4)
    modes = [Contrast(6, 2), Exit(6), Original(), Contrast(6, 2, alpha=0.01)]
    together, _ = scores_of(modes, heads)
    for row, mode in enumerate(modes):
        alone, _ = scores_of([mode], heads, hidden[:, row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


def difference(upper, lower):
    assert upper.shape == lower.shape == (1, 1, VOCAB)
    assert upper.dtype == lower.dtype == torch.float32
    return upper - 0.5 * lower


def raising(upper, lower):
    raise RuntimeError("no such token")


def test_a_custom_function_replaces_the_formula():
    heads, hidden = Heads(), states(3)
    mode = Contrast(6, 2, function=difference)
    scores, failures = scores_of([mode, Exit(6), mode], heads)
    six, two = heads.logits(6, hidden[6]), heads.logits(2, hidden[2])
    expected = torch.stack([six[0] - 0.5 * two[0], six[1], six[2] - 0.5 * two[2]])
    torch.testing.assert_close(scores, expected)
    assert failures == {}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising, "raised RuntimeError: no such token"),
        (lambda upper, lower: upper[0], r"returned shape \[1, 11\], not \[1, 1, 11\]"),
        (lambda upper, lower: None, "returned NoneType, not a tensor"),
        (lambda upper, lower: upper.to(torch.complex64), "returned torch.complex64"),
    ],
)
def test_a_failing_function_harms_its_own_row_alone(function, message):
    heads, hidden = Heads(), states(2)
    scores, failures = scores_of([Exit(6), Contrast(6, 2, function=function)], heads)
    torch.testing.assert_close(scores[0], heads.logits(6, hidden[6])[0])
    assert scores[1].tolist() == [0.0] * VOCAB
    assert list(failures) == [1]
    with pytest.raises(ValueError, match=message):
        raise ValueError(failures[1])


def test_a_function_may_write_into_its_arguments():
    def sloppy(upper, lower):
        return upper.sub_(lower)

    heads, hidden = Heads(), states(2)
    modes = [Contrast(6, 2, function=sloppy)] * 2
    six, two = heads.logits(6, hidden[6]), heads.logits(2, hidden[2])
    torch.testing.assert_close(scores_of(modes, heads)[0], six - two)


def test_bfloat16_weights_give_float32_scores():
    heads = Heads()
    heads.weights = heads.weights.bfloat16()
    scores, _ = scores_of([Exit(6), Contrast(6, 2)], heads, states(2).bfloat16())
    assert scores.dtype == torch.float32
