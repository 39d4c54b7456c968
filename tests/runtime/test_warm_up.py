"""A warm engine captures nothing more for requests of its mode, whatever they were said to want."""

from __future__ import annotations

import random

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
from multiexit_engine.runtime.device.graphs import graph_sizes
from multiexit_engine.runtime.launched.edit_memory import EDITS_OF_A_ROW
from multiexit_engine.runtime.launched.warm_wishes import most_edits, possible_wishes
from tests.engine.company import run_in_random_company
from tests.runtime.on_simulated_device import on_cpu, on_device, token_ids
from tests.tiny import save_gpt2

PLAIN = SamplingParams(max_new_tokens=6, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=0.9, top_p=0.8, seed=1)
LISTED = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=2)
PENALISED = SamplingParams(
    max_new_tokens=6, ignore_eos=True, repetition_penalty=1.4, presence_penalty=0.3
)
BIASED = SamplingParams(max_new_tokens=4, ignore_eos=True, logit_bias={3: 5.0, 7: -2.0})
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20]
SMALL = {"cuda_graphs": (4,), "max_model_len": 64, "max_batch_size": 4}
slow = pytest.mark.slow
MODES = [
    pytest.param(Original(), marks=slow),
    Contrast(4, 2),
    EarlyExit(0.05),
    pytest.param(EarlyExit(0.85, "similarity", kv="copy"), marks=slow),
    pytest.param(DoLa("low"), marks=slow),
]
DRAFTERS = [
    SelfSpeculative(2, 3, Contrast(4, 2)),
    pytest.param(SelfSpeculative(2, 3), marks=slow),
    pytest.param(SelfSpeculative(2, "auto"), marks=slow),
    pytest.param(SelfSpeculative(2, "auto", DoLa("low")), marks=slow),
]
COMPANIES = [[PENALISED, PLAIN, LISTED], [BIASED, DRAWN, LISTED]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    return save_gpt2(path, num_layers=4, num_heads=2, exits=(2, 4))


@pytest.fixture
def few_waiting(monkeypatch):
    """Steps of few rows, so that few numbers of waiting ones are captured."""
    monkeypatch.setattr("multiexit_engine.runtime.launched.decode_steps.SPARE_ROWS", 20)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_edits_and_log_probabilities_that_were_announced_wait_for_nothing(
    folder, mode, few_waiting
):
    host = on_cpu(folder, max_model_len=64)
    with on_device(folder, **SMALL) as (engine, device):
        engine.warm_up(mode, [PENALISED, BIASED, LISTED])
        captures = device.counts["captures"]
        for company in COMPANIES:
            found = engine.generate(PROMPTS, company, mode)
            assert token_ids(found) == token_ids(host.generate(PROMPTS, company, mode))
        assert device.counts["captures"] == captures > 0


@pytest.mark.parametrize("mode", DRAFTERS, ids=str)
def test_drafts_wait_for_nothing(folder, mode):
    host = on_cpu(folder, max_model_len=64)
    with on_device(folder, **{**SMALL, "cuda_graphs": (1, 4)}) as (engine, device):
        engine.warm_up(mode)
        captures = device.counts["captures"]
        for prompts in (PROMPTS[:1], PROMPTS):
            found = engine.generate(prompts, PLAIN, mode)
            assert token_ids(found) == token_ids(host.generate(prompts, PLAIN, mode))
        assert engine.stats().num_drafted_tokens
        assert device.counts["captures"] == captures > 0


def in_mixed_company(folder, announced, modes, draw, **options):
    """Requests of warm modes that come and go, with wishes of which nobody spoke."""
    wishes = [
        {},
        {"top_k": 5},
        {"presence_penalty": 0.5},
        {"logprobs": 1},
        {"logit_bias": {3: 2.0}},
    ]
    requests = [
        (
            [draw.randrange(250) for _ in range(draw.randrange(1, 9))],
            SamplingParams(
                max_new_tokens=draw.randrange(2, 12),
                ignore_eos=True,
                temperature=1.0 if i % 2 else 0.0,
                seed=i,
                **wishes[i % 5],
            ),
            draw.choice(modes),
        )
        for i in range(12)
    ]
    alone = on_cpu(folder, max_model_len=64)
    with on_device(folder, **SMALL, **options) as (engine, device):
        for mode in announced:
            engine.warm_up(mode)
        captures = device.counts["captures"]
        found, _ = run_in_random_company(engine, requests, draw)
        assert device.counts["captures"] == captures > 0
        assert device.counts["replays"] > 50
    for place, ids in found.items():
        prompt, sampling, mode = requests[place]
        assert ids == [o.token_ids for o in alone.generate(prompt, sampling, mode)[0].outputs]


def test_modes_in_one_batch_wait_for_nothing_whatever_they_want(folder, few_waiting):
    modes = [Original(), Exit(2), Contrast(4, 2), EarlyExit(0.05)]
    in_mixed_company(folder, modes, modes, random.Random(4), async_scheduling=True)


@pytest.mark.parametrize("most", [4, pytest.param("auto", marks=slow)])
def test_drafts_of_unequal_numbers_wait_for_nothing(folder, most):
    modes = [SelfSpeculative(2, length) for length in (1, 2, most)]
    in_mixed_company(folder, modes[2:], [*modes, Original()], random.Random(5))


def test_captures_are_counted_in_the_docs(folder):
    """Two spans of layers, then heads: listed or not, narrowed or not."""
    sizes, bounds = 1, 1
    with on_device(folder, **SMALL) as (engine, device):
        engine.warm_up(Contrast(4, 2))
        assert device.counts["captures"] == sizes * (2 * bounds + 4)
        # heads told or not, without edits or with room for 256 or 512; and the latest tokens
        device.counts.clear()
        engine.warm_up(Contrast(4, 2), [LISTED, PENALISED])
        assert device.counts["captures"] == sizes * 4 * (2 * 3 - 1) + 1


def test_a_mode_is_warm_alone(folder):
    with on_device(folder, **SMALL) as (engine, device):
        engine.warm_up(Exit(2))
        captures = device.counts["captures"]
        engine.generate(PROMPTS, PLAIN, Exit(2))
        assert device.counts["captures"] == captures
        engine.generate(PROMPTS, PLAIN, Exit(4))
        assert device.counts["captures"] > captures


@pytest.mark.parametrize(
    ("sampling", "count"),
    [([], 44), ([LISTED], 88), ([BIASED], 208), ([PENALISED], 380), ([PENALISED, LISTED], 760)],
    ids=["plain", "listed", "biased", "penalised", "both"],
)
def test_heads_of_a_full_engine_are_counted_in_the_docs(sampling, count):
    """For 64 sequences of up to 1024 tokens, rows listed or not."""
    most = EDITS_OF_A_ROW * (4 * 64 + 65)
    room = [min(most, size * most_edits(sampling, 1024)) for size in graph_sizes(64)]
    assert sum(2 * len(possible_wishes(Original(), sampling, each)) for each in room) == count
