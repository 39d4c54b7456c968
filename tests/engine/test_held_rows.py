"""Rows that wait at an exit for others choose the same tokens at the same exits."""

import random
from dataclasses import replace

import pytest

from multiexit_engine import EarlyExit, Engine
from multiexit_engine.decoding.depth_policy import DepthPolicy
from tests.engine.families import EARLY_EXITS, PATIENT
from tests.engine.test_early_exit import SAMPLINGS, prompts
from tests.tiny import save_gpt2, save_probes


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


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Exits with heads of their own, and exits that share one and agree often."""
    folder = save_probes(save_gpt2(tmp_path_factory.mktemp("probed")), (2, 4))
    shared = {"vocab_projection_mode": "SHARED_PROJECTION_DIRECT"}
    return [Engine.from_pretrained(folder, dtype="float32", **own) for own in ({}, shared)]


@pytest.mark.parametrize("kv", ["recompute", "copy"])
@pytest.mark.parametrize("mode", [*EARLY_EXITS, *PATIENT], ids=str)
@pytest.mark.parametrize("name", ["greedy", "several"])
def test_rows_that_waited_choose_what_they_would_have_chosen(engines, holding, name, mode, kv):
    engine = engines[mode in PATIENT]
    mode = replace(mode, kv=kv)
    sampling = replace(SAMPLINGS[name], max_new_tokens=20, confidences=name == "several")
    alone = [pair for prompt in prompts(6) for pair in results(engine, [prompt], sampling, mode)]
    holding.clear()
    assert results(engine, prompts(6), sampling, mode) == alone
    assert any(holding)


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
