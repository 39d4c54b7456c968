"""Rows that choose their exit on the device and want more than a token: what the host gives."""

from __future__ import annotations

import pytest

from multiexit_engine import EarlyExit, Original, SamplingParams
from tests.forms import written_in
from tests.runtime.exit_models import are_launched, assert_same, exits, own_heads, shared_head
from tests.runtime.on_simulated_device import on_cpu, on_device

PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20, [77], [5, 6]]
COUNTED = {"max_new_tokens": 7, "ignore_eos": True, "confidences": True}
ENDING = {"max_new_tokens": 7, "confidences": True}
WARM = {**COUNTED, "temperature": 1.2, "seed": 3}
WISHES = [
    SamplingParams(**COUNTED, repetition_penalty=1.4),
    SamplingParams(**WARM, presence_penalty=0.7, frequency_penalty=0.4, logprobs=3),
    SamplingParams(**COUNTED, logit_bias={7: 4.0, 50: -3.0, 100: 5.0}, logprobs=0),
    SamplingParams(**WARM, top_k=9, top_p=0.9, min_p=0.02, no_repeat_ngram_size=2),
    SamplingParams(**COUNTED, logprobs=20),
    SamplingParams(**ENDING, min_new_tokens=5, bad_words=((7,), (8, 9))),
    SamplingParams(**WARM, top_k=0, logprobs=5, logit_bias={3: 2.0}),
    SamplingParams(**ENDING, **written_in("[a-z]{3,9}"), logprobs=2),
]
MODES = [
    EarlyExit(0.3),
    EarlyExit(0.85, "similarity"),
    EarlyExit(2, "patience", kv="copy"),
    EarlyExit(0.5, "probe"),
    EarlyExit(2.5, "entropy", shortlist=50),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return own_heads(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return shared_head(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.mark.parametrize("kind", ["folder", "shared"])
def test_edits_masks_and_logprobs_are_those_of_the_host(kind, request):
    folder = request.getfixturevalue(kind)
    places = range(len(WISHES))
    prompts, modes = [PROMPTS[i % 5] for i in places], [MODES[i % 5] for i in places]
    wanted = on_cpu(folder).generate(prompts, WISHES, modes)
    assert exits(wanted) == {2, 4, 6}
    with on_device(folder) as (engine, _):
        steps = are_launched(engine)
        assert_same(engine.generate(prompts, WISHES, modes), wanted)
        assert all(steps)
        engine._scheduler.check_integrity()


LOOKING = [
    SamplingParams(**WARM, typical_p=0.8),
    SamplingParams(**COUNTED, logprobs=25, repetition_penalty=1.4),
    SamplingParams(**COUNTED),
    SamplingParams(**WARM, top_k=0, typical_p=0.9, presence_penalty=0.5, logprobs=3),
    WISHES[1],
]


@pytest.mark.parametrize("kind", ["folder", "shared"])
def test_rows_that_want_whole_distributions_get_those_of_their_exits(kind, request):
    folder = request.getfixturevalue(kind)
    wanted = on_cpu(folder).generate(PROMPTS, LOOKING, MODES)
    assert len(exits(wanted)) > 1
    with on_device(folder, cuda_graphs=(2, 4, 8)) as (engine, _):
        steps = are_launched(engine)
        assert_same(engine.generate(PROMPTS, LOOKING, MODES), wanted)
        assert all(steps)


def test_several_texts_of_a_prompt_choose_their_exits_as_on_the_cpu(folder):
    sampling = [SamplingParams(**WARM, n=3), SamplingParams(**COUNTED)]
    wanted = on_cpu(folder).generate(PROMPTS[:2], sampling, MODES[:2])
    with on_device(folder) as (engine, device):
        steps = are_launched(engine)
        found = engine.generate(PROMPTS[:2], sampling, MODES[:2])
        assert all(steps)
    for one, other in zip(found, wanted, strict=True):
        told = [[(o.token_ids, o.exit_layers) for o in each.outputs] for each in (one, other)]
        assert told[0] == told[1]


def test_wishes_of_some_rows_are_nothing_to_others(folder):
    """Rows of other modes, with edits of their own, go ahead of the host until exits are chosen."""
    modes = [EarlyExit(0.3), Original(), EarlyExit(0.85, "similarity"), Original()]
    sampling = [WISHES[0], WISHES[1], SamplingParams(**COUNTED), SamplingParams(**WARM)]
    options = {"cuda_graphs": (2, 4), "async_scheduling": True}
    alone = on_cpu(folder)
    wanted = [alone.generate(*each)[0] for each in zip(PROMPTS, sampling, modes, strict=False)]
    with on_device(folder, **options) as (engine, device):
        assert_same(engine.generate(PROMPTS[:4], sampling, modes), wanted)
        assert device.counts["replays"]


def test_a_step_with_edits_waits_once(folder):
    with on_device(folder) as (engine, device):
        for prompt, sampling in zip(PROMPTS, WISHES[:3], strict=False):
            engine.add_request(prompt, sampling, MODES[0])
        engine.step()
        device.counts.clear()
        engine.step()
    # the rows, what is to be known of their exits, and their edits
    assert device.counts == {"pinned copies": 3, "copies to the host": 2, "synchronisations": 1}


def test_a_row_that_is_left_no_token_fails_alone(folder):
    alone = {"logit_bias": {}, "bad_words": tuple((t,) for t in range(257) if t != 256)}
    nothing = SamplingParams(max_new_tokens=3, min_new_tokens=2, **alone)
    with on_device(folder) as (engine, _):
        bad, good = engine.generate(PROMPTS[:2], [nothing, WISHES[0]], MODES[0])
    assert "leave no token" in bad.error
    assert_same([good], on_cpu(folder).generate(PROMPTS[1], WISHES[0], MODES[0]))
