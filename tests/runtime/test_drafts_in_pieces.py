"""Drafts and their check in one launched step: the same tokens as the CPU's, and one wait."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from multiexit_engine import (
    Contrast,
    DoLa,
    EarlyExit,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from tests.runtime.exit_models import are_launched, assert_same, exits
from tests.runtime.on_simulated_device import on_cpu, on_device, token_ids
from tests.tiny import save_gpt2

GREEDY = SamplingParams(max_new_tokens=7, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.9, top_k=0, seed=1)
WARPED = SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.9, seed=2)
LISTED = SamplingParams(max_new_tokens=7, ignore_eos=True, logprobs=2)
LONG = SamplingParams(max_new_tokens=12, ignore_eos=True, confidences=True)
SHORT = SamplingParams(max_new_tokens=3, ignore_eos=True)
PENALISED = SamplingParams(max_new_tokens=7, ignore_eos=True, repetition_penalty=1.3)
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20]


def drafting(target=None, draft_len=3):
    return SelfSpeculative(2, draft_len, Original() if target is None else target)


def tree_drafting():
    return SelfSpeculative(2, 3, tree=(2, 2))


CASES = {
    "greedy": ([GREEDY] * 3, [drafting()] * 3),
    "drawn": ([DRAWN, GREEDY, DRAWN], [drafting()] * 3),
    "contrast": ([GREEDY, DRAWN, GREEDY], [drafting(Contrast(4, 2))] * 3),
    "dola": ([GREEDY] * 3, [drafting(DoLa("low"))] * 3),
    "warped": ([WARPED, GREEDY, WARPED], [drafting()] * 3),
    "listed": ([LISTED, GREEDY, SHORT], [drafting()] * 3),
    "lengths": ([GREEDY, SHORT, DRAWN], [drafting(), drafting(draft_len=1), drafting()]),
    "beside others": ([GREEDY, DRAWN, WARPED], [drafting(), Original(), Contrast(4, 2)]),
    "other depths": ([GREEDY] * 3, [drafting(), Exit(2), drafting()]),
    "two exits": ([GREEDY] * 3, [drafting(), SelfSpeculative(4, draft_len=2), drafting()]),
    "trees": ([GREEDY, DRAWN, WARPED], [drafting(), tree_drafting(), tree_drafting()]),
    "penalties": ([PENALISED, GREEDY, GREEDY], [drafting()] * 3),
    "early exits": ([GREEDY] * 3, [drafting(), EarlyExit(threshold=0.5), drafting()]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers above exit 2 change little, so that some drafts are right."""
    folder = save_gpt2(
        tmp_path_factory.mktemp("tiny") / "gpt2", num_layers=6, num_heads=2, exits=(2, 4, 6)
    )
    tensors = load_file(folder / "model.safetensors")
    (embeddings,) = (value for name, value in tensors.items() if name.endswith("wte.weight"))
    for name, value in tensors.items():
        if "lm_exit_head" in name:
            value.copy_(embeddings)
        elif "c_proj" in name and int(name.split(".h.")[1].split(".")[0]) >= 2:
            value *= 0.3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_drafts_in_pieces_give_the_ids_of_the_cpu(folder, name):
    sampling, modes = CASES[name]
    wanted = token_ids(on_cpu(folder).generate(PROMPTS, sampling, modes))
    with on_device(folder, cuda_graphs=(1, 2, 4), async_scheduling=True) as (engine, _):
        assert token_ids(engine.generate(PROMPTS, sampling, modes)) == wanted
        engine._scheduler.check_integrity()


@pytest.mark.parametrize("name", ["greedy", "contrast", "drawn"])
def test_a_step_with_drafts_launches_graphs_and_waits_once(folder, name):
    sampling, modes = CASES[name]
    with on_device(folder, cuda_graphs=(4,)) as (engine, device):
        for _ in range(2):
            engine.generate(PROMPTS, sampling, modes)
        for prompt, params, mode in zip(PROMPTS, sampling, modes, strict=True):
            engine.add_request(prompt, params, mode)
        engine.step()
        device.counts.clear()
        engine.step()
        assert engine.stats().num_drafted_tokens
    # four rounds of layers, three of drafts, the layers above, the heads
    assert device.counts.pop("replays") >= 9
    assert device.counts == {"pinned copies": 1, "copies to the host": 1, "synchronisations": 1}


BESIDE = {
    "recompute": [drafting(), EarlyExit(0.3), EarlyExit(0.6, "similarity"), Exit(2)],
    "copy": [EarlyExit(0.3, kv="copy"), drafting(Contrast(4, 2)), drafting(), EarlyExit(0.1)],
    "exits beyond": [drafting(), EarlyExit(0.05, layers=(4,)), drafting(draft_len=1), Original()],
}


@pytest.mark.parametrize("name", BESIDE)
def test_rows_that_choose_their_exit_stand_beside_drafts(folder, name):
    sampling = [LONG, LONG, DRAWN, LONG]
    prompts = [*PROMPTS, [77]]
    wanted = on_cpu(folder).generate(prompts, sampling, BESIDE[name])
    with on_device(folder, cuda_graphs=(1, 2, 4)) as (engine, _):
        steps = are_launched(engine)
        assert_same(engine.generate(prompts, sampling, BESIDE[name]), wanted)
        assert all(steps)
        assert engine.stats().num_drafted_tokens
        engine._scheduler.check_integrity()
    assert len(exits(wanted)) > 1


def test_a_step_with_drafts_and_early_exits_waits_once(folder):
    with on_device(folder) as (engine, device):
        for prompt, mode in zip(PROMPTS, [drafting(), EarlyExit(0.3), drafting()], strict=True):
            engine.add_request(prompt, LONG, mode)
        for _ in range(2):
            engine.step()
        device.counts.clear()
        engine.step()
        assert engine.stats().num_drafted_tokens
    # the rows, and what is to be known of their exits
    assert device.counts == {"pinned copies": 2, "copies to the host": 2, "synchronisations": 1}


def test_accepted_drafts_are_counted_as_on_the_cpu(folder):
    engine = on_cpu(folder)
    engine.generate(PROMPTS, GREEDY, drafting())
    wanted = engine.stats()
    with on_device(folder, cuda_graphs=(4,)) as (engine, _):
        engine.generate(PROMPTS, GREEDY, drafting())
        found = engine.stats()
    assert found.num_drafted_tokens == wanted.num_drafted_tokens > 0
    assert found.num_accepted_tokens == wanted.num_accepted_tokens > 0
