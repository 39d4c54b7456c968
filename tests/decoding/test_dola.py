import math

import pytest
import torch

from multiexit_engine.decoding import dola
from multiexit_engine.decoding.dola import dola_scores
from multiexit_engine.decoding.exits import mode_scores
from multiexit_engine.decoding.plan import dola_layers, plan_exits, resolve_mode
from multiexit_engine.layers.exit_heads import Head, HeadOperands
from multiexit_engine.params import Contrast, DoLa, Exit, Original
from tests.decoding.test_plan import ORIGINAL, config

VOCAB, HIDDEN = 101, 16


def operands(num_heads, rows, seed=1):
    """Heads on one matrix, each with hidden states of its own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    hidden = torch.randn(num_heads, rows, HIDDEN, generator=generator)
    return [HeadOperands(own, weight, None) for own in hidden]


def truth(mature, candidates, row, top=0.1):
    """One row's scores in float64, from the definitions."""
    log_p, *log_qs = (
        (head.hidden[row].double() @ head.weight.double().T).log_softmax(-1)
        for head in (mature, *candidates)
    )

    def divergence(log_q):
        p, q = log_p.exp(), log_q.exp()
        m = (p + q) / 2
        return (p * (p / m).log() + q * (q / m).log()).sum()

    log_q = max(log_qs, key=divergence)
    return torch.where(log_p >= log_p.max() + math.log(top), log_p - log_q, -math.inf)


@pytest.mark.parametrize("num_candidates", [1, 2, 5])
def test_every_row_is_contrasted_with_its_own_layer(num_candidates):
    mature, *candidates = operands(1 + num_candidates, 7)
    actual = dola_scores(mature, candidates, [0.1] * 7, "exact")
    expected = torch.stack([truth(mature, candidates, row) for row in range(7)])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


def test_many_rows_are_done_in_parts_of_the_same_scores(monkeypatch):
    mature, *candidates = operands(4, 9)
    whole = dola_scores(mature, candidates, [0.1] * 9, "exact")
    monkeypatch.setattr(dola, "MAX_LOGIT_ROWS", 8)
    torch.testing.assert_close(dola_scores(mature, candidates, [0.1] * 9, "exact"), whole)


def test_heads_with_weights_of_their_own_are_used():
    heads = [operands(1, 3, seed)[0] for seed in range(3)]
    actual = dola_scores(heads[0], heads[1:], [0.2] * 3, "exact")
    expected = torch.stack([truth(heads[0], heads[1:], row, 0.2) for row in range(3)])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


def test_of_equal_candidates_the_first_is_taken():
    mature, other = operands(2, 1)
    found = dola_scores(mature, [other, other], [0.1], "exact")
    assert torch.equal(found, dola_scores(mature, [other], [0.1], "exact"))


class Heads:
    def operands(self, head, hidden):
        weight = torch.randn(
            11, 4, generator=torch.Generator().manual_seed(0 if head.is_raw else 1)
        )
        return HeadOperands(hidden, weight, None)


def test_rows_of_a_mixed_batch_do_not_depend_on_their_mates():
    modes = [DoLa("low"), Original(), DoLa([0, 4]), DoLa("low", 0.5), DoLa("low", jsd="reference")]
    hidden = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(2))

    def scores(rows):
        plan = plan_exits([modes[row] for row in rows], config())
        taps = {k: hidden[k, [rows[i] for i in own]] for k, own in plan.rows_at.items()}
        return mode_scores(plan, taps, Heads())[0]

    together = scores(list(range(5)))
    for row in range(5):
        torch.testing.assert_close(scores([row])[0], together[row])


@pytest.mark.parametrize(
    ("preset", "num_layers", "is_tied", "expected"),
    [
        ("low", 8, False, (0, 2)),
        ("low", 8, True, (2,)),
        ("low", 12, True, (2, 4)),
        ("high", 12, True, (6, 8, 10)),
        ("high", 7, False, (3, 5)),
        ("low", 32, False, tuple(range(0, 16, 2))),
        ("high", 32, False, tuple(range(16, 32, 2))),
        ("low", 40, False, tuple(range(0, 20, 2))),
        ("low", 80, False, tuple(range(0, 20, 2))),
        ("high", 80, False, tuple(range(60, 80, 2))),
        ("high", 41, False, tuple(range(21, 41, 2))),
        ("low", 1, True, (0,)),
        ("low", 2, True, (1,)),
        ("low", 3, True, ()),
        ("low", 4, True, (2,)),
        ("low", 1, False, (0,)),
        ("high", 1, True, (0,)),
    ],
)
def test_presets_are_those_of_transformers(preset, num_layers, is_tied, expected):
    assert dola_layers(preset, num_layers, is_tied) == expected


def test_heads_of_a_mode():
    resolved = resolve_mode(DoLa((0, 4)), config())
    assert resolved.upper == ORIGINAL and resolved.depth == 8
    assert resolved.candidates == (Head(0, is_raw=True), Head(4, is_raw=True))


def test_a_mature_exit_and_candidate_exits_run_no_deeper():
    resolved = resolve_mode(DoLa((2, 4), mature=6, heads="exits"), config())
    assert resolved.heads == (Head(6), Head(2), Head(4)) and resolved.depth == 6


def test_a_model_without_exits_runs_dola():
    assert resolve_mode(DoLa("high"), config(exits=())).candidates == (
        Head(4, is_raw=True),
        Head(6, is_raw=True),
    )


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (DoLa(8), r"DoLa.candidates=\(8,\): the mature head reads layer 8; .* 0 to 7"),
        (DoLa((2, 6), mature=6), "the mature head reads layer 6"),
        (DoLa(2, mature=5), "DoLa.mature=5: this model has exits at layers 2, 4, 6, 8"),
        (DoLa(3, heads="exits"), "DoLa.candidates=3: this model has exits at layers 2, 4, 6, 8"),
    ],
)
def test_layers_that_cannot_be_are_named(mode, message):
    with pytest.raises(ValueError, match=message):
        resolve_mode(mode, config())


def test_hidden_states_are_kept_at_every_candidate():
    plan = plan_exits([DoLa((0, 4)), Exit(4), Contrast(6, 2)], config())
    assert plan.rows_at == {0: (0,), 2: (2,), 4: (0, 1), 6: (2,), 8: (0,)}
