"""Prompts whose tokens choose their exit, scored on the device: the host's numbers, one wait."""

from __future__ import annotations

import pytest

from multiexit_engine import EarlyExit, SamplingParams
from tests.runtime.exit_models import are_launched, assert_same, own_heads, shared_head
from tests.runtime.on_simulated_device import on_cpu, on_device

PROMPTS = [[1, 2, 3, 77, 5], [200, 100, 50, 25, 12], [*range(40)]]
MODES = [
    EarlyExit(0.3),
    EarlyExit(2.5, "entropy", shortlist=50),
    EarlyExit(0.1, "margin"),
    EarlyExit(0.85, "similarity"),
    EarlyExit(2, "patience", kv="copy"),
    EarlyExit(0.5, "probe"),
]
TOLD = SamplingParams(max_new_tokens=4, ignore_eos=True, confidences=True, prompt_logprobs=2)
GREEDY = SamplingParams(max_new_tokens=6, ignore_eos=True, confidences=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return own_heads(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return shared_head(tmp_path_factory.mktemp("tiny") / "gpt2")


def scores(engine, mode):
    found = engine.score(PROMPTS, decoding=mode)
    return [one.token_logprobs[1:] for one in found], [one.is_greedy for one in found]


@pytest.mark.parametrize("kind", ["folder", "shared"])
def test_scores_are_those_of_the_exits_that_the_host_would_choose(kind, request):
    folder = request.getfixturevalue(kind)
    host = on_cpu(folder)
    with on_device(folder, max_num_batched_tokens=16) as (engine, _):
        steps = are_launched(engine)
        for mode in MODES:
            (found, is_greedy), (wanted, was_greedy) = scores(engine, mode), scores(host, mode)
            assert is_greedy == was_greedy
            for one, other in zip(found, wanted, strict=True):
                assert one == pytest.approx(other, abs=1e-4)
        assert all(steps)


def test_prompts_are_scored_beside_others_that_go_on(folder):
    sampling, modes = [GREEDY, TOLD, TOLD], [MODES[0], MODES[0], MODES[3]]
    wanted = on_cpu(folder).generate(PROMPTS, sampling, modes)
    options = {"max_num_batched_tokens": 16, "async_scheduling": True, "cuda_graphs": (2, 4)}
    with on_device(folder, **options) as (engine, _):
        steps = are_launched(engine)
        found = engine.generate(PROMPTS, sampling, modes)
        assert all(steps)
    assert_same(found, wanted)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        pairs = zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
        for place, (told, wanted_of) in enumerate(pairs, 1):
            assert [*told] == [*wanted_of]
            token = one.prompt_token_ids[place]
            assert told[token].rank == wanted_of[token].rank
            assert told[token].logprob == pytest.approx(wanted_of[token].logprob, abs=1e-4)


def test_a_scored_prompt_waits_once(folder):
    with on_device(folder) as (engine, device):
        engine.score(PROMPTS[0], decoding=MODES[0])
        device.counts.clear()
        engine.score(PROMPTS[1], decoding=MODES[0])
    assert not device.counts["waits"]
    assert device.counts["synchronisations"] == 1
