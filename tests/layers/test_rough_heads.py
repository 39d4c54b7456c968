"""Codes of heads: made once, used where they pay, given up where they do not."""

from dataclasses import replace

import pytest
import torch

from multiexit_engine.layers import rough_heads
from multiexit_engine.layers.rough_heads import PATIENCE, HeadRows, RoughHeads
from multiexit_engine.ops import shared_head_tokens
from multiexit_engine.ops.tokens import RowGroup
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
        quantize(weight, Quantization(8)),
    ):
        assert heads.codes(other) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_in_half_precision_have_codes(heads, dtype):
    hidden, weight = (each.to(dtype) for each in operands())
    tokens, _ = heads.best_tokens(hidden, weight, None)
    assert heads.codes(weight) is not None
    assert tokens.tolist() == (hidden.double() @ weight.double().T).argmax(1).tolist()


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


def contrasted(alpha, temperature=0.0):
    """Two rows alone, three against another head."""
    hidden, weight = operands()
    generator = torch.Generator().manual_seed(1)
    lower = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    groups = [RowGroup(2), RowGroup(3, hidden[2:] * 0.9, lower)]
    nothing = torch.zeros(5, dtype=torch.int64)
    heats = torch.tensor([temperature] * 2 + [0.0] + [temperature] * 2)
    counts = torch.zeros(5, dtype=torch.int32)
    return HeadRows(hidden, groups, torch.tensor(alpha), heats, nothing, nothing, counts), weight


def exact(rows, weight):
    counts = torch.zeros(5, dtype=torch.int32)
    draws = rows.temperature, rows.seeds, rows.positions
    choice = rows.groups, rows.alpha, None, *draws, counts
    tokens, log_probs = shared_head_tokens(rows.hidden, weight, None, *choice)
    return tokens.tolist(), counts.tolist(), log_probs


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_alone_and_contrasts_together_have_the_exact_tokens(heads, temperature):
    rows, weight = contrasted([0.1] * 5, temperature)
    tokens, log_probs = heads.tokens(rows, weight, None)
    assert (tokens.tolist(), rows.num_candidates.tolist()) == exact(rows, weight)[:2]
    assert log_probs.tolist() == [0.0] * 5


def test_a_row_that_takes_all_tokens_is_read_exactly(heads):
    rows, weight = contrasted([0.1, 0.1, 0.1, 0.0, 0.1])
    tokens, log_probs = heads.tokens(rows, weight, None)
    wanted, counts, wanted_log_probs = exact(rows, weight)
    assert (tokens.tolist(), rows.num_candidates.tolist()) == (wanted, counts)
    assert counts[3] == 300
    assert log_probs.tolist() == [0.0, 0.0, 0.0, wanted_log_probs[3], 0.0]


def test_contrasts_that_codes_leave_open_are_given_up_alone(heads):
    rows, weight = contrasted([0.0] * 5)
    for _ in range(PATIENCE):
        assert heads.tokens(rows, weight, None) is not None
    assert heads.tokens(rows, weight, None) is None
    assert heads.codes(weight) is not None


def test_contrasts_with_lower_heads_of_another_type_are_left_alone(heads):
    rows, weight = contrasted([0.1] * 5)
    lower = rows.groups[1]._replace(lower_weight=quantize(weight, Quantization(8)))
    assert heads.tokens(replace(rows, groups=[rows.groups[0], lower]), weight, None) is None


def test_states_of_many_rows_have_one_term_and_what_that_leaves_open_two(heads, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    weight[150:] = weight[:150] + 1e-5  # neighbours that only exact logits tell apart
    wanted = (hidden @ weight.T).argmax(1)
    asked, code_states = [], rough_heads.code_states

    def noted(some, head, num_terms):
        asked.append((len(some), num_terms))
        found = code_states(some, head, num_terms)
        if num_terms == 1:
            found.errors[:9] = torch.nan  # as of rows that it leaves open
        return found

    monkeypatch.setattr(rough_heads, "code_states", noted)
    tokens, _ = heads.best_tokens(hidden, weight, None)
    assert asked == [(40, 1), (9, 2)]
    assert tokens.tolist() == wanted.tolist()
    asked.clear()
    heads.best_tokens(hidden[: rough_heads.FEW_ROWS], weight, None)
    assert asked == [(rough_heads.FEW_ROWS, 2)]


def test_the_first_tokens_alone_may_be_looked_at(heads):
    rows, weight = contrasted([0.1] * 5, 1.0)
    rows = replace(rows, groups=[RowGroup(5)])
    tokens, _ = heads.tokens(rows, weight, None, num_tokens=100)
    assert tokens.tolist() == exact(rows, weight[:100])[0]
    assert heads.tokens(rows, weight, None, num_tokens=50) is None


def test_codes_that_seldom_spare_a_test_the_head_are_asked_now_and_then(heads):
    hidden, weight = operands()
    answers = []
    for _ in range(200):
        answers.append(heads.statistics(hidden, weight, None) is not None)
        if answers[-1]:
            heads.note_test(weight, None, is_spared=False)
    assert all(answers[:19]) and 8 <= sum(answers[50:]) <= 12
    assert heads.statistics(hidden, weight, None, shortlist=80) is not None
