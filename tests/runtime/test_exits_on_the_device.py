"""Rows that choose their exit on the device, in launched steps: what the host would choose."""

from __future__ import annotations

import pytest

from multiexit_engine import Contrast, EarlyExit, Exit, Original, SamplingParams
from tests.runtime.exit_models import are_launched, assert_same, exits, own_heads, shared_head
from tests.runtime.on_simulated_device import on_cpu, on_device

GREEDY = SamplingParams(max_new_tokens=7, ignore_eos=True, confidences=True)
DRAWN = SamplingParams(
    max_new_tokens=7, ignore_eos=True, confidences=True, temperature=0.9, top_k=0, seed=1
)
NARROWED = SamplingParams(
    max_new_tokens=7, ignore_eos=True, confidences=True, temperature=0.9, top_k=20, seed=2
)
LONG = SamplingParams(max_new_tokens=12, ignore_eos=True, confidences=True)
SAMPLING = [GREEDY, DRAWN, NARROWED]
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20, [77], [5, 6]]
# thresholds that about half of the rows pass
MODES = [
    EarlyExit(0.3),
    EarlyExit(0.1, "margin"),
    EarlyExit(2.5, "entropy"),
    EarlyExit(0.85, "similarity"),
    EarlyExit(2, "patience"),
    EarlyExit(0.5, "probe"),
    EarlyExit(0.3, shortlist=100),
    EarlyExit(2.5, "entropy", shortlist=50),
    EarlyExit(0.3, kv="copy"),
    EarlyExit(0.85, "similarity", kv="copy"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return own_heads(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return shared_head(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.mark.parametrize("kind", ["folder", "shared"])
def test_all_measures_in_one_batch_give_the_choices_of_the_host(kind, request):
    folder = request.getfixturevalue(kind)
    prompts = [PROMPTS[i % 5] for i in range(len(MODES))]
    sampling = [SAMPLING[i % 3] for i in range(len(MODES))]
    wanted = on_cpu(folder).generate(prompts, sampling, MODES)
    assert exits(wanted) == {2, 4, 6}
    with on_device(folder) as (engine, _):
        steps = are_launched(engine)
        assert_same(engine.generate(prompts, sampling, MODES), wanted)
        assert all(steps)
        engine._scheduler.check_integrity()


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_rows_beside_other_modes_choose_as_the_host_does(folder, kv):
    modes = [EarlyExit(0.3, kv=kv), Exit(2), Contrast(4, 2), EarlyExit(2, "patience", kv=kv)]
    sampling = [GREEDY, DRAWN, GREEDY, NARROWED]
    alone = on_cpu(folder)
    wanted = [alone.generate(*each)[0] for each in zip(PROMPTS, sampling, modes, strict=False)]
    with on_device(folder, cuda_graphs=(1, 2, 4), async_scheduling=True) as (engine, device):
        assert_same(engine.generate(PROMPTS[:4], sampling, modes), wanted)
        assert device.counts["replays"]


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_preempted_and_cached_sequences_choose_as_on_the_cpu(folder, kv):
    prompts = [[*range(16), i] for i in range(4)]
    options = {"kv_cache_memory": 9 * 4 * 2 * 6 * 64 * 4, "block_size": 4, "max_model_len": 32}
    mode = EarlyExit(0.3, kv=kv)
    wanted = on_cpu(folder, **options).generate(prompts, LONG, mode)
    with on_device(folder, **options) as (engine, _):
        steps = are_launched(engine)
        assert_same(engine.generate(prompts, LONG, mode), wanted)
        stats = engine.stats()
    assert stats.num_preemptions and stats.prefix_hit_tokens
    assert all(steps)


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_rows_that_would_wait_too_long_are_completed(folder, kv, monkeypatch):
    monkeypatch.setattr("multiexit_engine.runtime.launched.decode_steps.SPARE_ROWS", 0)
    monkeypatch.setattr("multiexit_engine.runtime.launched.decode_steps.MOST_ROUNDS", 7)
    mode = EarlyExit(0.05, kv=kv)
    options = {"max_batch_size": 2, "block_size": 4}
    wanted = on_cpu(folder, **options).generate(PROMPTS[:2], LONG, mode)
    with on_device(folder, **options) as (engine, _):
        steps = are_launched(engine)
        found, most = {}, 0
        for prompt in PROMPTS[:2]:
            engine.add_request(prompt, LONG, mode)
        while engine.has_unfinished():
            found |= {output.request_id: output for output in engine.step()}
            running = [s for r in engine._core.requests.values() for s in r.sequences]
            most = max(most, sum(s.num_computed_tokens - s.waiting[0].start
                                 for s in running if s.waiting))  # fmt: skip
    assert_same([found[name] for name in sorted(found)], wanted)
    assert all(steps)
    assert 1 < most <= 2


def test_a_step_launches_graphs_and_waits_once(folder):
    modes = [EarlyExit(0.3), EarlyExit(0.85, "similarity"), Original()]
    with on_device(folder, cuda_graphs=(4,)) as (engine, device):
        for _ in range(2):
            engine.generate(PROMPTS[:3], GREEDY, modes)
        for prompt, mode in zip(PROMPTS, modes, strict=False):
            engine.add_request(prompt, GREEDY, mode)
        engine.step()
        device.counts.clear()
        engine.step()
    # spans to 1, 2, 3, 4 and 6, the states that wait, the heads of both kinds of rows
    assert device.counts.pop("replays") == 8
    # the rows, and what is to be known of their exits
    assert device.counts == {"pinned copies": 2, "copies to the host": 2, "synchronisations": 1}


def test_a_warm_engine_captures_nothing_more(folder, monkeypatch):
    monkeypatch.setattr("multiexit_engine.runtime.launched.decode_steps.SPARE_ROWS", 20)
    mode, sampling = EarlyExit(0.85, "similarity", kv="copy"), SAMPLING[:2]
    options = {"cuda_graphs": (2,), "max_model_len": 64, "max_batch_size": 2}
    wanted = on_cpu(folder).generate(PROMPTS[:2], sampling, mode)
    with on_device(folder, **options) as (engine, device):
        engine.warm_up(mode)
        captures = device.counts["captures"]
        assert_same(engine.generate(PROMPTS[:2], sampling, mode), wanted)
        assert device.counts["captures"] == captures > 0
        assert device.counts["replays"]
