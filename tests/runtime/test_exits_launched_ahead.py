"""Steps that are launched before it is known which rows of the last one left change nothing."""

from __future__ import annotations

import random

import pytest

from multiexit_engine import Contrast, EarlyExit, Exit, Original, SamplingParams
from multiexit_engine.runtime.runner import ModelRunner
from tests.engine.company import run_in_random_company
from tests.runtime.exit_models import are_launched, assert_same, exits, own_heads
from tests.runtime.on_simulated_device import on_cpu, on_device

COUNTED = {"max_new_tokens": 9, "ignore_eos": True, "confidences": True}
GREEDY = SamplingParams(**COUNTED)
DRAWN = SamplingParams(**COUNTED, temperature=0.9, top_k=20, seed=1)
PENALISED = SamplingParams(**COUNTED, repetition_penalty=1.4, presence_penalty=0.6, logprobs=2)
TYPICAL = SamplingParams(**COUNTED, temperature=0.9, typical_p=0.8, seed=3)
FOLLOWING = SamplingParams(**COUNTED, no_repeat_ngram_size=2)
SAMPLING = [GREEDY, DRAWN, PENALISED]
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20, [77], [5, 6]]
MODES = [
    EarlyExit(0.3),
    EarlyExit(0.1, "margin"),
    EarlyExit(2.5, "entropy", shortlist=50),
    EarlyExit(0.85, "similarity"),
    EarlyExit(2, "patience", kv="copy"),
    EarlyExit(0.5, "probe"),
    EarlyExit(0.3, kv="copy"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return own_heads(tmp_path_factory.mktemp("tiny") / "gpt2")


def ahead(folder, **options):
    return on_device(folder, async_scheduling=True, **options)


def run(engine, device):
    """Outputs in order of the requests, and operations still to come when each step was known."""
    outputs, num_waiting = {}, []
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
        if engine.has_unfinished():
            num_waiting.append(device.num_waiting())
    return [outputs[name] for name in sorted(outputs)], num_waiting


@pytest.mark.parametrize("graphs", [(), (2, 8)], ids=["eager", "graphs"])
def test_the_next_step_is_launched_before_it_is_known_who_left(folder, graphs):
    prompts = [PROMPTS[i % 5] for i in range(len(MODES))]
    sampling = [SAMPLING[i % 3] for i in range(len(MODES))]
    wanted = on_cpu(folder).generate(prompts, sampling, MODES)
    assert exits(wanted) == {2, 4, 6}
    with ahead(folder, cuda_graphs=graphs) as (engine, device):
        for each in zip(prompts, sampling, MODES, strict=True):
            engine.add_request(*each)
        found, num_waiting = run(engine, device)
        assert_same(found, wanted)
        assert all(num_waiting)
        engine._scheduler.check_integrity()


@pytest.mark.parametrize("sampling", [TYPICAL, FOLLOWING], ids=["looked at", "not launched"])
def test_rows_that_look_at_their_distributions_go_on_as_they_should(folder, sampling):
    wanted = on_cpu(folder).generate(PROMPTS[:2], [sampling, GREEDY], MODES[0])
    with ahead(folder, cuda_graphs=(2,)) as (engine, _):
        assert_same(engine.generate(PROMPTS[:2], [sampling, GREEDY], MODES[0]), wanted)


def test_a_step_copies_as_much_as_one_that_was_not_launched_ahead(folder):
    with ahead(folder) as (engine, device):
        for prompt, mode in zip(PROMPTS, [EarlyExit(0.3), Original()], strict=False):
            engine.add_request(prompt, GREEDY, mode)
        for _ in range(3):
            engine.step()
        device.counts.clear()
        engine.step()
    assert device.counts == {"pinned copies": 2, "copies to the host": 2, "synchronisations": 1}


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_preempted_and_cached_sequences_give_what_they_give_on_the_cpu(folder, kv):
    prompts = [[*range(16), i] for i in range(4)]
    options = {"kv_cache_memory": 9 * 4 * 2 * 6 * 64 * 4, "block_size": 4, "max_model_len": 32}
    wanted = on_cpu(folder, **options).generate(prompts, GREEDY, EarlyExit(0.3, kv=kv))
    with ahead(folder, **options) as (engine, _):
        steps = are_launched(engine)
        assert_same(engine.generate(prompts, GREEDY, EarlyExit(0.3, kv=kv)), wanted)
        assert all(steps)
        # blocks of the output, whose rows waited, are found by who goes on from there
        outputs = [output.outputs[0].token_ids for output in wanted]
        longer = [[*prompt, *own] for prompt, own in zip(prompts, outputs, strict=True)]
        again = on_cpu(folder, **options).generate(longer, GREEDY, Contrast(4, 2))
        assert_same(engine.generate(longer, GREEDY, Contrast(4, 2)), again)
        stats = engine.stats()
    assert stats.num_preemptions and stats.prefix_hit_tokens
    assert stats.num_free_kv_blocks == stats.num_kv_blocks


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_rows_that_would_wait_too_long_are_completed(folder, kv, monkeypatch):
    monkeypatch.setattr("multiexit_engine.runtime.launched.decode_steps.SPARE_ROWS", 0)
    monkeypatch.setattr("multiexit_engine.runtime.launched.decode_steps.MOST_ROUNDS", 8)
    mode = EarlyExit(0.05, kv=kv)
    options = {"max_batch_size": 2, "block_size": 4}
    wanted = on_cpu(folder, **options).generate(PROMPTS[:2], GREEDY, mode)
    with ahead(folder, **options) as (engine, device):
        for prompt in PROMPTS[:2]:
            engine.add_request(prompt, GREEDY, mode)
        found, num_waiting = run(engine, device)
    assert_same(found, wanted)
    assert all(num_waiting)


def test_sequences_that_end_early_leave_nothing_behind(folder):
    first = on_cpu(folder).generate([1, 2, 3], GREEDY, MODES[0])[0].outputs[0]
    stops = [
        SamplingParams(**COUNTED, stop_token_ids=first.token_ids[4:5]),
        SamplingParams(**COUNTED, stop=[first.text[3:5]]),
        GREEDY,
    ]
    wanted = on_cpu(folder).generate([[1, 2, 3]] * 3, stops, MODES[0])
    with ahead(folder) as (engine, _):
        assert_same(engine.generate([[1, 2, 3]] * 3, stops, MODES[0]), wanted)
        stats = engine.stats()
        assert stats.num_free_kv_blocks == stats.num_kv_blocks


def test_as_many_tokens_of_each_layer_are_counted(folder):
    modes, sampling = [MODES[0], Exit(2), MODES[6]], [GREEDY, DRAWN, GREEDY]
    alone = on_cpu(folder)
    alone.generate(PROMPTS[:3], sampling, modes)
    with ahead(folder, max_batch_size=2, cuda_graphs=(2,)) as (engine, _):
        engine.generate(PROMPTS[:3], sampling, modes)
        stats = engine.stats()
    assert stats.num_tokens_by_layer == alone.stats().num_tokens_by_layer


@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_requests_in_random_company_give_their_ids(folder, seed, monkeypatch):
    launches = []
    launch = ModelRunner.launch
    monkeypatch.setattr(
        ModelRunner,
        "launch",
        lambda self, batch, before=None: (
            launches.append(before is not None) or launch(self, batch, before)
        ),
    )
    draw = random.Random(seed)
    modes = [*MODES, Original(), Contrast(4, 2)]
    wishes = [{}, {"top_k": 5}, {"presence_penalty": 0.5}, {"logprobs": 1}, {"n": 2}]
    requests = [
        (
            [draw.randrange(250) for _ in range(draw.randrange(1, 12))],
            SamplingParams(
                max_new_tokens=draw.randrange(1, 7),
                temperature=1.0 if i % 3 else 0.0,
                seed=i,
                **(wishes[i % 5] if i % 3 else {}),
            ),
            draw.choice(modes),
        )
        for i in range(12)
    ]
    alone = on_cpu(folder)
    options = {"max_batch_size": 4, "max_num_batched_tokens": 16, "cuda_graphs": (1, 2, 4)}
    with ahead(folder, **options) as (engine, _):
        found, aborted = run_in_random_company(engine, requests, draw)
    assert len(found) + len(aborted) == 12
    assert launches.count(True) > 10
    for place, ids in found.items():
        prompt, sampling, mode = requests[place]
        assert ids == [o.token_ids for o in alone.generate(prompt, sampling, mode)[0].outputs]
