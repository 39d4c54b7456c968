"""Rows that wait at an exit for others choose the same tokens at the same exits."""

import random
from dataclasses import replace

import pytest

from multiexit_engine import Contrast, DoLa, EarlyExit, Engine, Exit, Original, SelfSpeculative
from multiexit_engine.decoding.depth_policy import DepthPolicy
from tests.engine.company import run_in_random_company
from tests.engine.test_early_exit import SAMPLINGS, prompts, tokens

MODES = [
    EarlyExit(0.3),
    EarlyExit(0.1, "margin"),
    EarlyExit(2.5, "entropy", shortlist=50),
    EarlyExit(0.85, "similarity"),
    EarlyExit(2, "patience"),
]
BLOCK_BYTES = 6 * 2 * 8 * 64 * 4


def results(engine, given, sampling, mode):
    completions = [c for o in engine.generate(given, sampling, mode) for c in o.outputs]
    return [(c.token_ids, c.exit_layers, c.confidences) for c in completions]


@pytest.fixture
def holding(monkeypatch):
    """Whether rows wait is drawn; gives the answers so far."""
    draw, answers = random.Random(5), []

    def holds(self, place):
        answers.append(place.num_coming > 0 and draw.random() < 0.6)
        return answers[-1]

    monkeypatch.setattr(DepthPolicy, "holds", holds)
    return answers


@pytest.mark.parametrize("kv", ["recompute", "copy"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", ["greedy", "several"])
def test_rows_that_waited_choose_what_they_would_have_chosen(engine, holding, name, mode, kv):
    mode, sampling = replace(mode, kv=kv), replace(SAMPLINGS[name], max_new_tokens=20)
    alone = [pair for prompt in prompts(6) for pair in results(engine, [prompt], sampling, mode)]
    holding.clear()
    assert results(engine, prompts(6), sampling, mode) == alone
    # the fixture's exits seldom agree, and nobody waits where nobody leaves
    assert any(holding) or mode.measure == "patience"


def test_random_company_aborts_and_preemptions_change_nothing(folder, holding):
    draw = random.Random(8)
    options = {"dtype": "float32", "block_size": 8, "max_batch_size": 8}
    engine = Engine.from_pretrained(folder, kv_cache_memory=40 * BLOCK_BYTES, **options)
    modes = [replace(mode, kv=kv) for mode in MODES for kv in ("recompute", "copy")]
    modes += [Original(), Exit(2), Contrast(6, 2), DoLa((0, 2, 4)), SelfSpeculative(2, 3)]
    modes += [SelfSpeculative(4, "auto", Contrast(6, 2)), SelfSpeculative(2, 2, DoLa((0, 2)))]
    requests = [
        (prompt, replace(draw.choice(list(SAMPLINGS.values())), seed=i), draw.choice(modes))
        for i, prompt in enumerate(prompts(50))
    ]
    alone = [tokens(engine.generate([p], s, m)) for p, s, m in requests]
    found, aborted = run_in_random_company(engine, requests, draw)
    assert found == {i: alone[i] for i in range(50) if i not in aborted}
    assert any(holding)
    assert aborted
    assert engine.stats().num_preemptions
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks


def test_a_row_waits_for_a_limited_number_of_steps(engine, monkeypatch):
    monkeypatch.setattr(DepthPolicy, "holds", lambda self, place: place.num_coming > 0)
    sampling = replace(SAMPLINGS["greedy"], max_new_tokens=40, ignore_eos=True)
    modes = [EarlyExit(1.1), EarlyExit(0.0)]
    ids = [engine.add_request([3, 1, 4], sampling, mode) for mode in modes]
    requests = [engine._core.requests[name] for name in ids]
    longest = 0
    while engine.has_unfinished():
        engine.step()
        held = requests[0].sequences[0].held
        longest = max(longest, held.num_steps if held is not None else 0)
    assert longest == 6
