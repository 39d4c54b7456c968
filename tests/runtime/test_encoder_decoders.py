"""Encoder-decoders on the device: their steps are launched whole, captured, and ahead."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from multiexit_engine import (
    Contrast,
    DoLa,
    EarlyExit,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from tests.engine.company import run_in_random_company
from tests.engine.families import FAMILIES, SOURCED
from tests.runtime.exit_models import are_launched, assert_same
from tests.runtime.on_simulated_device import on_cpu, on_device, token_ids

GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.9, top_p=0.9, seed=1)
LISTED = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=2)
PENALISED = SamplingParams(max_new_tokens=8, repetition_penalty=1.3, no_repeat_ngram_size=2)
FORCED = SamplingParams(max_new_tokens=4, forced_bos_token_id=9, forced_eos_token_id=2)
SEVERAL = SamplingParams(max_new_tokens=5, temperature=1.0, top_k=0, seed=2, n=3)
BEAMS = SamplingParams(max_new_tokens=6, num_beams=2, no_repeat_ngram_size=2)
SOURCES = [[5] * 7, [9, 8, 7, 300], [44, 4, 4], [*range(20, 60)], [6]]
EARLY = EarlyExit(0.4, layers=(1, 2, 3))
MIXED = {
    "plain": (
        [GREEDY, DRAWN, LISTED, PENALISED, FORCED],
        [Original(), Exit(2), Contrast("original", 2), Contrast(4, 1), Original()],
    ),
    "looking": ([GREEDY, SEVERAL, BEAMS], [DoLa((1, 2)), Original(), Exit(2)]),
    "early": (
        [GREEDY, DRAWN, GREEDY, GREEDY],
        [EARLY, EarlyExit(0.4, layers=(1, 2, 3), kv="copy"), Exit(2), Original()],
    ),
    "drafts": (
        [GREEDY, DRAWN],
        [SelfSpeculative(1, 3), SelfSpeculative(1, 2, Contrast("original", 2))],
    ),
}
slow = pytest.mark.slow
KINDS = pytest.mark.parametrize("family", SOURCED)
CASES = pytest.mark.parametrize("name", MIXED)


def options(family, **own):
    return {**FAMILIES[family].options, **own}


@slow
@KINDS
@CASES
def test_tokens_are_those_of_the_cpu(family, name):
    sampling, modes = MIXED[name]
    sources = SOURCES[: len(modes)]
    wanted = on_cpu(SOURCED[family], **options(family)).generate(sources, sampling, modes)
    with on_device(SOURCED[family], **options(family)) as (engine, _):
        steps = are_launched(engine)
        assert_same(engine.generate(sources, sampling, modes), wanted)
        assert all(steps)
        engine._scheduler.check_integrity()


@pytest.mark.parametrize("family", [pytest.param("bart", marks=slow), "t5"])
@CASES
def test_captured_steps_launched_ahead_give_the_same(family, name):
    sampling, modes = MIXED[name]
    sources = SOURCES[: len(modes)]
    wanted = on_cpu(SOURCED[family], **options(family)).generate(sources, sampling, modes)
    own = options(family, cuda_graphs=(1, 4, 8), async_scheduling=True)
    with on_device(SOURCED[family], **own) as (engine, device):
        assert_same(engine.generate(sources, sampling, modes), wanted)
        assert device.counts["replays"]


@KINDS
def test_a_replayed_step_copies_once_each_way_and_waits_once(family):
    with on_device(SOURCED[family], **options(family, cuda_graphs=(1,))) as (engine, device):
        engine.add_request(SOURCES[0], GREEDY, Contrast("original", 2))
        for _ in range(2):
            engine.step()
        device.counts.clear()
        engine.step()
    # two spans of layers, and the heads
    assert device.counts.pop("replays") == 3
    assert device.counts == {"pinned copies": 1, "copies to the host": 1, "synchronisations": 1}


def test_layers_that_nobody_is_left_for_are_passed_over():
    folder, mode = SOURCED["bart"], EarlyExit(0.2, layers=(1, 2, 3))
    wanted = on_cpu(folder, **options("bart")).generate(SOURCES[:3], GREEDY, mode)
    own = options("bart", cuda_graphs=(4,), conditional_nodes=True)
    with on_device(folder, **own) as (engine, device):
        for _ in range(2):
            assert_same(engine.generate(SOURCES[:3], GREEDY, mode), wanted)
        assert device.counts["passed over"]


@KINDS
def test_the_step_that_reads_a_source_waits_once_and_is_launched_ahead(family):
    own = options(family, cuda_graphs=(1, 2), async_scheduling=True)
    wanted = on_cpu(SOURCED[family], **options(family)).generate(SOURCES[:2], GREEDY, Exit(2))
    with on_device(SOURCED[family], **own) as (engine, device):
        names = [engine.add_request(SOURCES[0], GREEDY, Exit(2))]
        for _ in range(3):
            engine.step()
        names.append(engine.add_request(SOURCES[1], GREEDY, Exit(2)))
        device.counts.clear()
        outputs = {output.request_id: output for output in engine.step()}
        assert device.num_waiting() > 0
        assert "pageable copies" not in device.counts
        assert device.counts["synchronisations"] == 1 and not device.counts["waits"]
        while engine.has_unfinished():
            outputs |= {output.request_id: output for output in engine.step()}
    assert token_ids([outputs[name] for name in names]) == token_ids(wanted)


@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=slow)])
@pytest.mark.parametrize(
    "mode",
    [pytest.param(Contrast("original", 2), marks=slow), EARLY],
    ids=["contrast", "early"],
)
def test_preempted_sequences_give_the_ids_of_the_cpu(family, mode):
    long = SamplingParams(max_new_tokens=14, ignore_eos=True)
    model = on_cpu(SOURCED[family], **options(family)).model_config
    width = model.num_kv_heads * model.head_dim
    own = options(
        family, block_size=4, max_model_len=32, kv_cache_memory=17 * 4 * 2 * 4 * width * 4
    )
    sources = [[*range(5, 12), i] for i in range(4)]
    wanted = on_cpu(SOURCED[family], **own).generate(sources, long, mode)
    with on_device(SOURCED[family], **own, cuda_graphs=(1, 2, 4), async_scheduling=True) as one:
        assert_same(one[0].generate(sources, long, mode), wanted)
        assert one[0].stats().num_preemptions


@KINDS
@pytest.mark.parametrize(
    "mode",
    [
        Contrast("original", 2),
        pytest.param(Original(), marks=slow),
        pytest.param(EARLY, marks=slow),
        pytest.param(SelfSpeculative(1, 2), marks=slow),
    ],
    ids=lambda mode: type(mode).__name__,
)
def test_a_warm_engine_captures_nothing_more_in_its_mode(family, mode, monkeypatch):
    monkeypatch.setattr("multiexit_engine.runtime.launched.decode_steps.SPARE_ROWS", 20)
    own = options(family, cuda_graphs=(4,), max_model_len=32, max_batch_size=4)
    # the checkpoint forces an end upon the last, at full length
    sampling = [GREEDY, replace(DRAWN, max_new_tokens=9), replace(GREEDY, ignore_eos=False)]
    wanted = on_cpu(SOURCED[family], **options(family)).generate(SOURCES[:3], sampling, mode)
    with on_device(SOURCED[family], **own) as (engine, device):
        engine.warm_up(mode)
        captures = device.counts["captures"]
        assert_same(engine.generate(SOURCES[:3], sampling, mode), wanted)
        assert device.counts["captures"] == captures > 0
        assert device.counts["replays"]


@slow
@KINDS
def test_requests_in_random_company_give_their_ids(family):
    draw = random.Random(5)
    kinds = [
        pair for sampling, modes in MIXED.values() for pair in zip(sampling, modes, strict=True)
    ]
    requests = [
        ([draw.randrange(3, 300) for _ in range(draw.randrange(1, 30))], *draw.choice(kinds))
        for _ in range(10)
    ]
    alone = on_cpu(SOURCED[family], **options(family))
    own = options(family, cuda_graphs=(1, 2, 4), async_scheduling=True, max_batch_size=5)
    with on_device(SOURCED[family], **own, max_num_batched_tokens=48) as (engine, _):
        found, aborted = run_in_random_company(engine, requests, draw)
    assert len(found) + len(aborted) == 10
    for place, ids in found.items():
        source, sampling, mode = requests[place]
        wanted = alone.generate(source, sampling, mode)[0]
        assert ids == [one.token_ids for one in wanted.outputs]
