"""What goes wrong while a step is on its way harms nobody else."""

from __future__ import annotations

import math

import pytest
from safetensors.torch import load_file, save_file

from multiexit_engine import Contrast, FinishReason, Original, SamplingParams, SelfSpeculative
from tests.runtime.on_simulated_device import on_cpu, on_device, token_ids
from tests.tiny import save_gpt2

GREEDY = SamplingParams(max_new_tokens=7, ignore_eos=True)
WARPED = SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.9, seed=1)
BAD_POSITION = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    return save_gpt2(path, num_layers=4, num_heads=2, exits=(2, 4))


@pytest.fixture(scope="module")
def broken_folder(tmp_path_factory):
    """A model whose states are NaN from one position on."""
    path = tmp_path_factory.mktemp("broken") / "gpt2"
    folder = save_gpt2(path, num_layers=4, num_heads=2, exits=(2, 4))
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("wpe.weight"))
    tensors[name][BAD_POSITION] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def launching(folder, **options):
    return on_device(folder, cuda_graphs=(1, 2, 4), async_scheduling=True, **options)


def run(engine):
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    return outputs


MODES = [Original(), SelfSpeculative(2, 2)]


@pytest.mark.parametrize(
    ("mode", "sampling"),
    [(Original(), WARPED), (Contrast(4, 2), GREEDY), (SelfSpeculative(2, 2), GREEDY)],
    ids=["looked at", "plain", "drafted"],
)
def test_a_row_of_nan_ends_its_request_and_no_other(broken_folder, mode, sampling):
    wanted = token_ids(on_cpu(broken_folder).generate([[1, 2, 3]], sampling, mode))
    with launching(broken_folder) as (engine, _):
        good = engine.add_request([1, 2, 3], sampling, mode)
        bad = engine.add_request([5] * (BAD_POSITION - 3), sampling, mode)
        outputs = run(engine)
        stats = engine.stats()
    assert token_ids([outputs[good]]) == wanted
    assert outputs[bad].outputs[0].finish_reason is FinishReason.ERROR
    assert stats.num_free_kv_blocks == stats.num_kv_blocks


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: type(mode).__name__)
def test_a_request_may_end_while_its_step_is_on_its_way(folder, mode):
    wanted = token_ids(on_cpu(folder).generate([[1, 2, 3]], WARPED, mode))
    with launching(folder) as (engine, device):
        names = [engine.add_request([1, 2, 3], WARPED, mode) for _ in range(3)]
        for _ in range(3):
            engine.step()
        for name in names[1:]:
            engine.abort(name)
        outputs = run(engine)
        stats = engine.stats()
    assert token_ids([outputs[names[0]]]) == wanted
    assert stats.num_free_kv_blocks == stats.num_kv_blocks


def test_an_engine_goes_on_after_a_step_that_nobody_wants_any_more(folder):
    wanted = token_ids(on_cpu(folder).generate([[1, 2, 3]], WARPED))
    with launching(folder) as (engine, device):
        names = [engine.add_request(prompt, WARPED) for prompt in ([5, 6], [7] * 20)]
        for _ in range(3):
            engine.step()
        assert device.num_waiting() > 0
        for name in names:
            engine.abort(name)
        assert token_ids(engine.generate([[1, 2, 3]], WARPED)) == wanted


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: type(mode).__name__)
def test_sequences_that_lose_their_blocks_in_flight_give_the_ids_of_the_cpu(folder, mode):
    prompts = [[*range(16), i] for i in range(4)]
    options = {"kv_cache_memory": 9 * 4 * 2 * 4 * 64 * 4, "block_size": 4, "max_model_len": 32}
    wanted = token_ids(on_cpu(folder, **options).generate(prompts, [GREEDY, WARPED] * 2, mode))
    with launching(folder, **options) as (engine, _):
        assert token_ids(engine.generate(prompts, [GREEDY, WARPED] * 2, mode)) == wanted
        assert engine.stats().num_preemptions
