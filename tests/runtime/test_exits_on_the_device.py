"""Rows that choose their exit on the device, in launched steps: what the host would choose."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from multiexit_engine import Contrast, EarlyExit, Exit, Original, SamplingParams
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.checkpoint.probes import FILE_NAME, ProbeWeights, write_probes
from tests.runtime.on_simulated_device import on_cpu, on_device
from tests.tiny import save_gpt2

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
    return with_probes(save_gpt2(tmp_path_factory.mktemp("tiny") / "gpt2", num_heads=2))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Exits with matrices of their own between their states and the model's head."""
    folder = save_gpt2(tmp_path_factory.mktemp("tiny") / "gpt2", num_heads=2)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name in [name for name in tensors if "lm_exit_head" in name]:
        layer = int(name.split("_")[-1].split(".")[0])
        if layer < 6:
            cast = torch.eye(64) * 3 + torch.randn(64, 64, generator=generator) * 0.3
            tensors[f"name_to_conv_matrix.{layer}_to_6.weight"] = cast
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_projection_mode"] = "SHARED_PROJECTION_CAST_OUTPUTS"
    (folder / "config.json").write_text(json.dumps(config))
    return with_probes(folder)


def with_probes(folder):
    """Probes that pass about half of the rows."""

    def random_probe(seed):
        draw = torch.Generator().manual_seed(seed)
        up, down = torch.randn(16, 64, generator=draw), torch.randn(1, 16, generator=draw)
        return ProbeWeights(up / 8, torch.zeros(16), down, torch.zeros(1))

    probes = {2: random_probe(1), 4: random_probe(2)}
    write_probes(folder / FILE_NAME, probes, open_checkpoint(folder).weights)
    return folder


def assert_same(found, wanted):
    """The same tokens and exits, and confidences up to rounding."""
    pairs = zip(found, wanted, strict=True)
    for one, other in ((a.outputs[0], b.outputs[0]) for a, b in pairs):
        assert (one.token_ids, one.exit_layers) == (other.token_ids, other.exit_layers)
        assert one.confidences == pytest.approx(other.confidences, abs=1e-5, nan_ok=True)


def exits(outputs):
    return {layer for output in outputs for layer in output.outputs[0].exit_layers}


def are_launched(engine):
    """A list that says of each step whether the device decided in it."""
    runner, found = engine._core.runner, []
    launch = runner.launch

    def noted(batch, before=None):
        step = launch(batch, before)
        found.append(step is not None)
        return step

    runner.launch = noted
    return found


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
    assert any(steps)


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_rows_that_would_wait_too_long_are_completed(folder, kv, monkeypatch):
    monkeypatch.setattr("multiexit_engine.runtime.decode_steps.SPARE_ROWS", 0)
    monkeypatch.setattr("multiexit_engine.runtime.decode_steps.MOST_ROUNDS", 7)
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
    monkeypatch.setattr("multiexit_engine.runtime.decode_steps.SPARE_ROWS", 20)
    mode, sampling = EarlyExit(0.85, "similarity", kv="copy"), SAMPLING[:2]
    options = {"cuda_graphs": (2,), "max_model_len": 64, "max_batch_size": 2}
    wanted = on_cpu(folder).generate(PROMPTS[:2], sampling, mode)
    with on_device(folder, **options) as (engine, device):
        engine.warm_up(mode)
        captures = device.counts["captures"]
        assert_same(engine.generate(PROMPTS[:2], sampling, mode), wanted)
        assert device.counts["captures"] == captures > 0
        assert device.counts["replays"]
