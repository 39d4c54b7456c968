"""Codes of heads: made once, used where they pay, given up where they do not."""

import pytest
import torch

from multiexit_engine.layers import rough_heads
from multiexit_engine.layers.rough_heads import PATIENCE, RoughHeads
from multiexit_engine.quantization import Quantization, quantize


@pytest.fixture
def heads(monkeypatch):
    monkeypatch.setattr(rough_heads, "are_codes_fast", lambda: True)
    monkeypatch.setattr(rough_heads, "LEAST_NUMBERS", 1000)
    return RoughHeads()


def operands(vocab=300):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 16, generator=generator), torch.randn(vocab, 16, generator=generator)


def test_codes_are_made_once(heads):
    _, weight = operands()
    assert heads.codes(weight) is heads.codes(weight) is not None


def test_heads_that_are_small_quantized_or_of_another_type_have_none(heads):
    _, weight = operands()
    for other in (
        weight[:50],
        weight.double(),
        weight.bfloat16(),
        quantize(weight, Quantization(8)),
    ):
        assert heads.codes(other) is None


def test_tokens_are_the_exact_ones_and_nan_is_told(heads):
    hidden, weight = operands()
    hidden[2, 3] = torch.nan
    tokens, log_probs = heads.best_tokens(hidden, weight, None)
    kept = [0, 1, 3, 4]
    assert tokens[kept].tolist() == (hidden @ weight.T).argmax(1)[kept].tolist()
    assert log_probs.isnan().tolist() == [False, False, True, False, False]


def test_codes_that_leave_most_rows_open_are_given_up(heads):
    hidden, weight = operands()
    hidden[:3] = torch.nan
    for _ in range(PATIENCE - 1):
        heads.best_tokens(hidden, weight, None)
    heads.best_tokens(operands()[0], weight, None)
    assert heads.codes(weight) is not None
    for _ in range(PATIENCE):
        heads.best_tokens(hidden, weight, None)
    assert heads.codes(weight) is None
    tokens, _ = heads.best_tokens(hidden, weight, None)
    assert tokens[3:].tolist() == (hidden @ weight.T).argmax(1)[3:].tolist()
