"""Steps that are launched before the last one's tokens are known change nothing that is given."""

from __future__ import annotations

import random

import pytest

from multiexit_engine import Contrast, DoLa, Exit, Original, SamplingParams, SelfSpeculative
from tests.engine.company import run_in_random_company
from tests.runtime.on_simulated_device import on_cpu, on_device, token_ids
from tests.tiny import save_gpt2

GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.9, top_k=0, seed=1)
DRAWN_THRICE = SamplingParams(max_new_tokens=6, temperature=1.0, top_k=0, seed=2, n=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    return save_gpt2(path, num_layers=4, num_heads=2, exits=(2, 4))


def ahead(folder, **options):
    return on_device(folder, async_scheduling=True, **options)


def whole(outputs):
    return [
        [(one.token_ids, one.text, one.finish_reason, one.logprobs, one.exit_layers)
         for one in output.outputs]
        for output in outputs
    ]  # fmt: skip


def test_the_next_step_is_launched_before_the_last_one_is_waited_for(folder):
    with ahead(folder) as (engine, device):
        engine.add_request([1, 2, 3], GREEDY, Exit(4))
        for _ in range(3):
            engine.step()
        assert device.num_waiting() > 100
        device.counts.clear()
        engine.step()
        assert device.counts == {
            "pinned copies": 1, "copies to the host": 1, "synchronisations": 1
        }  # fmt: skip


WARPED = SamplingParams(max_new_tokens=9, ignore_eos=True, temperature=0.9, seed=1)
LISTED = SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=2)


@pytest.mark.parametrize(
    ("sampling", "mode"),
    [(WARPED, Original()), (LISTED, Contrast(4, 2)), (GREEDY, DoLa("low"))],
    ids=["warped", "logprobs", "dola"],
)
def test_rows_that_look_at_their_distribution_are_launched_ahead_too(folder, sampling, mode):
    wanted = token_ids(on_cpu(folder).generate([[1, 2, 3], [5, 6]], [sampling, GREEDY], mode))
    with ahead(folder, cuda_graphs=(1, 2)) as (engine, device):
        names = [engine.add_request([1, 2, 3], sampling, mode)]
        names += [engine.add_request([5, 6], GREEDY, mode)]
        outputs, replays = {}, 0
        while engine.has_unfinished():
            replays = device.counts["replays"]
            outputs |= {output.request_id: output for output in engine.step()}
            assert device.num_waiting() > 0 or not engine.has_unfinished()
    assert replays
    assert token_ids([outputs[name] for name in names]) == wanted


COUNTING = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 2.0, "presence_penalty": -0.5},
    "no token twice": {"no_repeat_ngram_size": 1},
    "bias": {"logit_bias": {3: 5.0, 7: 4.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0},
    "no end yet": {"ignore_eos": False, "min_new_tokens": 5, "bad_words": ([7], [9])},
}


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("mode", [Original(), Contrast(4, 2, min_candidates=2)], ids=str)
def test_a_token_that_the_host_does_not_know_yet_is_counted(folder, name, mode):
    asked = {"max_new_tokens": 9, "ignore_eos": True, **COUNTING[name]}
    sampling = [
        SamplingParams(**asked),
        SamplingParams(**asked, temperature=0.5, top_k=5, seed=3),
    ]
    prompts = [[1, 2, 3], [5, 6]]
    wanted = token_ids(on_cpu(folder).generate(prompts, sampling, mode))
    with ahead(folder, cuda_graphs=(1, 2)) as (engine, device):
        names = [engine.add_request(*pair, mode) for pair in zip(prompts, sampling, strict=True)]
        outputs = {}
        while engine.has_unfinished():
            outputs |= {output.request_id: output for output in engine.step()}
            assert device.num_waiting() > 0 or not engine.has_unfinished()
    assert token_ids([outputs[name] for name in names]) == wanted


FOLLOWING = SamplingParams(max_new_tokens=9, ignore_eos=True, no_repeat_ngram_size=2)


def test_bans_wait_for_the_tokens_that_they_look_at_and_others_go_on(folder):
    prompts = [[1, 2, 3], [5, 6]]
    wanted = whole(on_cpu(folder).generate(prompts, [FOLLOWING, WARPED]))
    with ahead(folder, cuda_graphs=(1, 2)) as (engine, device):
        assert whole(engine.generate(prompts, [FOLLOWING, WARPED])) == wanted
        assert device.counts["replays"] > device.counts["captures"]


def test_penalties_of_rows_that_choose_outside_of_pieces_wait_too(folder):
    penalised = SamplingParams(max_new_tokens=9, ignore_eos=True, presence_penalty=2.0)
    prompts, modes = [[1, 2, 3], [5, 6]], [DoLa("low"), Contrast(4, 2)]
    wanted = token_ids(on_cpu(folder).generate(prompts, penalised, modes))
    with ahead(folder) as (engine, _):
        assert token_ids(engine.generate(prompts, penalised, modes)) == wanted


def test_a_prompt_that_arrives_is_launched_ahead_and_so_is_what_follows_it(folder):
    long = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.8, seed=2)
    wanted = token_ids(on_cpu(folder).generate([[1, 2, 3], [*range(40)]], [long, DRAWN]))
    with ahead(folder, max_num_batched_tokens=16) as (engine, device):
        first = engine.add_request([1, 2, 3], long)
        for _ in range(3):
            engine.step()
        second = engine.add_request([*range(40)], DRAWN)
        outputs = {}
        for _ in range(8):
            outputs |= {output.request_id: output for output in engine.step()}
            assert device.num_waiting() > 0
        while engine.has_unfinished():
            outputs |= {output.request_id: output for output in engine.step()}
    assert token_ids([outputs[first], outputs[second]]) == wanted


def test_prompts_are_scored_while_others_decode(folder):
    scored = SamplingParams(max_new_tokens=3, ignore_eos=True, prompt_logprobs=2)
    prompts = [[1, 2, 3], [*range(40)]]
    wanted = on_cpu(folder).generate(prompts, [GREEDY, scored])
    with ahead(folder, max_num_batched_tokens=16) as (engine, _):
        found = engine.generate(prompts, [GREEDY, scored])
    assert token_ids(found) == token_ids(wanted)
    ids = [[list(p) for p in output[1].prompt_logprobs[1:]] for output in (found, wanted)]
    assert ids[0] == ids[1]


CASES = {
    "mixed modes": (
        [[1, 2, 3], [200, 100, 50], [77]],
        [GREEDY, DRAWN, SamplingParams(max_new_tokens=3)],
        [Contrast(4, 2), Original(), Exit(2)],
    ),
    "logprobs": ([[1, 2], [3]], [SamplingParams(max_new_tokens=6, logprobs=2), GREEDY], None),
    "several": ([[1, 2], [3]], [DRAWN_THRICE, GREEDY], None),
    "beams": ([[1, 2], [3]], [SamplingParams(max_new_tokens=6, num_beams=2), GREEDY], None),
    "drafts": ([[1, 2], [3]], [GREEDY, DRAWN], [SelfSpeculative(2), Original()]),
    "one token": ([[1, 2], [3]], [SamplingParams(max_new_tokens=1), GREEDY], None),
}


@pytest.mark.parametrize("name", CASES)
def test_requests_give_what_they_give_one_step_at_a_time(folder, name):
    prompts, sampling, modes = CASES[name]
    wanted = on_cpu(folder).generate(prompts, sampling, modes)
    with ahead(folder) as (engine, _):
        found = engine.generate(prompts, sampling, modes)
        engine._scheduler.check_integrity()
    assert token_ids(found) == token_ids(wanted)


def test_a_sequence_that_ends_early_leaves_nothing_behind(folder):
    first = on_cpu(folder).generate([1, 2, 3], GREEDY)[0].outputs[0]
    stops = [
        SamplingParams(max_new_tokens=9, ignore_eos=True, stop_token_ids=first.token_ids[4:5]),
        SamplingParams(max_new_tokens=9, ignore_eos=True, stop=[first.text[3:5]]),
    ]
    prompts = [[1, 2, 3], [1, 2, 3]]
    wanted = whole(on_cpu(folder).generate(prompts, stops))
    with ahead(folder) as (engine, _):
        assert whole(engine.generate(prompts, stops)) == wanted
        # and the engine serves others after the step that was launched in vain
        assert token_ids(engine.generate([1, 2, 3], GREEDY)) == [[list(first.token_ids)]]
        stats = engine.stats()
        assert stats.num_free_kv_blocks == stats.num_kv_blocks


def test_a_stream_comes_in_the_same_pieces(folder):
    def pieces(engine):
        return [(p.text, p.token_ids, p.finish_reason) for p in engine.stream("hello", GREEDY)]

    wanted = pieces(on_cpu(folder))
    with ahead(folder) as (engine, _):
        assert pieces(engine) == wanted


def test_preempted_sequences_give_the_ids_of_the_cpu(folder):
    prompts = [[*range(16), i] for i in range(4)]
    options = {"kv_cache_memory": 9 * 4 * 2 * 4 * 64 * 4, "block_size": 4, "max_model_len": 32}
    wanted = token_ids(on_cpu(folder, **options).generate(prompts, GREEDY, Contrast(4, 2)))
    with ahead(folder, cuda_graphs=(1, 2, 4), **options) as (engine, _):
        assert token_ids(engine.generate(prompts, GREEDY, Contrast(4, 2))) == wanted
        assert engine.stats().num_preemptions


def test_requests_in_random_company_give_their_ids_with_graphs(folder):
    draw = random.Random(3)
    modes = [Original(), Exit(2), Contrast(4, 2), DoLa("low")]
    wishes = [
        {"top_k": 0},
        {},
        {"top_p": 0.9},
        {"logprobs": 1},
        {"presence_penalty": 0.5},
        {"n": 2},
    ]
    requests = [
        (
            [draw.randrange(250) for _ in range(draw.randrange(1, 12))],
            SamplingParams(
                max_new_tokens=draw.randrange(1, 7),
                temperature=1.0 if i % 3 else 0.0,
                seed=i,
                **(wishes[i % 6] if i % 3 else {}),
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
    for place, ids in found.items():
        prompt, sampling, mode = requests[place]
        assert ids == [o.token_ids for o in alone.generate(prompt, sampling, mode)[0].outputs]
