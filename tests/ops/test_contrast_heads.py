import pytest
import torch

from multiexit_engine.ops import contrast, contrast_heads, contrast_logits, use_backend
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)

SHAPES = pytest.mark.parametrize(
    ("rows", "vocab", "hidden_size"), [(1, 7, 4), (1, 1031, 63), (3, 100, 33), (9, 257, 16)]
)


def operands(rows, vocab, hidden_size, dtype=torch.float32):
    """Hidden states and weights whose logits spread over about three units."""
    generator = torch.Generator().manual_seed(vocab)
    shapes = [(rows, hidden_size), (vocab, hidden_size)] * 2
    scale = 3.0 * hidden_size**-0.25
    return tuple((torch.randn(s, generator=generator) * scale**0.5).to(dtype) for s in shapes)


def from_both_heads(hidden, weight, lower_hidden, lower_weight, alpha, least=None):
    upper = hidden.double() @ weight.double().T
    lower = lower_hidden.double() @ lower_weight.double().T
    return contrast_logits.reference(upper, lower, alpha, least)


@SHAPES
@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("least", [None, 1, 3])
@pytest.mark.parametrize("share", [0.0, 0.25, 2.0])
def test_equals_the_contrast_of_both_heads(
    monkeypatch, rows, vocab, hidden_size, alpha, least, share
):
    monkeypatch.setattr(contrast, "SPARSE_SHARE", share)
    args = operands(rows, vocab, hidden_size)
    alphas = torch.full((rows,), alpha)
    counts = None if least is None else torch.full((rows,), least)
    actual = contrast_heads.reference(*args, alphas, counts)
    assert actual.dtype == torch.float32
    expected = from_both_heads(*args, alphas, counts)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


def test_more_candidates_than_are_fetched_at_once(monkeypatch):
    monkeypatch.setattr(contrast, "FETCHED_ROWS", 5)
    monkeypatch.setattr(contrast, "SPARSE_SHARE", 1.0)
    args, alpha = operands(3, 100, 33), torch.zeros(3)
    actual = contrast_heads.reference(*args, alpha)
    torch.testing.assert_close(actual.double(), from_both_heads(*args, alpha), rtol=0, atol=2e-5)


def test_lower_head_is_not_read_for_a_single_candidate():
    hidden, weight, lower_hidden, lower_weight = operands(2, 50, 8)
    alpha = torch.ones(2)
    poisoned = torch.full_like(lower_weight, torch.nan)
    actual = contrast_heads.reference(hidden, weight, lower_hidden, poisoned, alpha)
    torch.testing.assert_close(actual, (hidden @ weight.T).log_softmax(-1))


def test_lower_head_is_read_at_candidates_only():
    hidden, weight, lower_hidden, lower_weight = operands(1, 1000, 8)
    alpha = torch.tensor([0.1])
    upper = hidden @ weight.T
    poisoned = lower_weight.clone()
    poisoned[upper[0] < upper.max() + alpha.log()] = torch.nan
    actual = contrast_heads.reference(hidden, weight, lower_hidden, poisoned, alpha)
    expected = contrast_heads.reference(hidden, weight, lower_hidden, lower_weight, alpha)
    assert torch.equal(actual, expected)


def test_infinite_lower_logits_give_no_nan():
    hidden, weight, lower_hidden, lower_weight = operands(2, 50, 8)
    lower_weight[::2] = torch.inf
    args = (hidden, weight, lower_hidden.abs(), lower_weight, torch.full((2,), 1e-3))
    assert not contrast_heads.reference(*args).isnan().any()


def test_bfloat16_weights_give_float32():
    args, alpha = operands(3, 100, 33, torch.bfloat16), torch.full((3,), 0.1)
    upper = (args[0] @ args[1].T).float()
    lower = args[2].float() @ args[3].float().T
    with use_backend("reference"):
        actual = contrast_heads.reference(*args, alpha)
    assert actual.dtype == torch.float32
    expected = contrast_logits.reference(upper, lower, alpha)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_rows_do_not_depend_on_each_other():
    hidden, weight, lower_hidden, lower_weight = operands(4, 100, 16)
    alpha = torch.tensor([0.1, 1e-3, 0.5, 1.0])
    together = contrast_heads.reference(hidden, weight, lower_hidden, lower_weight, alpha)
    for row in range(4):
        one = slice(row, row + 1)
        alone = contrast_heads.reference(
            hidden[one], weight, lower_hidden[one], lower_weight, alpha[one]
        )
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@all_backends(contrast_heads)
@SHAPES
def test_backend_matches_reference(backend, rows, vocab, hidden_size):
    implementation = implementation_or_skip(contrast_heads, backend)
    device = device_for(contrast_heads, backend)
    args = tuple(x.to(device) for x in operands(rows, vocab, hidden_size))
    args = (*args, torch.full((rows,), 0.1, device=device))
    assert_as_good_as_reference(contrast_heads, implementation(*args), args, tolerance=1e-5)


@all_backends(contrast_heads)
@pytest.mark.parametrize("least", [None, 3])
@pytest.mark.parametrize("share", [0.0, 2.0])
def test_the_plausible_tokens_are_counted(monkeypatch, backend, least, share):
    monkeypatch.setattr(contrast, "SPARSE_SHARE", share)
    args, alpha = operands(3, 100, 33), torch.tensor([0.1, 1.0, 1e-3])
    wanted = None if least is None else torch.full((3,), least)
    expected, actual, own = (torch.full((3,), -1, dtype=torch.int32) for _ in range(3))
    upper = args[0] @ args[1].T
    contrast_logits.reference(upper, upper, alpha, wanted, expected)
    implementation_or_skip(contrast_heads, backend)(*args, alpha, wanted, actual)
    contrast_heads.reference(*args, alpha, wanted, own)
    assert actual.tolist() == own.tolist() == expected.tolist()
