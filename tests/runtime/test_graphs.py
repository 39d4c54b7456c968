"""Captured decode steps: replays serve other contents of the memory that they were captured on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from multiexit_engine import Contrast, DoLa, Exit, Original, SamplingParams
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.runtime.device.graphs import Graphs, graph_sizes, key_bounds
from multiexit_engine.runtime.settings import pick_graph_sizes
from tests.runtime.on_simulated_device import on_cpu, on_device, token_ids
from tests.tiny import save_gpt2

GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.9, top_k=0, seed=1)
LISTED = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=1)
MODES = [Contrast(4, 2), Original(), Exit(2), Contrast(4, 2, alpha=0.5), Exit(4)]
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20, [77], [5, 6]]
SAMPLING = [GREEDY, DRAWN, GREEDY, DRAWN, SamplingParams(max_new_tokens=3, ignore_eos=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    return save_gpt2(path, num_layers=4, num_heads=2, exits=(2, 4))


def test_a_mixed_batch_gives_the_ids_of_the_cpu(folder):
    wanted = token_ids(on_cpu(folder).generate(PROMPTS, SAMPLING, MODES))
    with on_device(folder, cuda_graphs=(2, 4, 8)) as (engine, device):
        assert token_ids(engine.generate(PROMPTS, SAMPLING, MODES)) == wanted
        assert device.counts["replays"] > device.counts["captures"] > 0


def test_what_one_request_captured_serves_another(folder):
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    sampling = [DRAWN, SamplingParams(max_new_tokens=12, temperature=0.7, top_k=0, seed=5)]
    wanted = [on_cpu(folder).generate(prompts[i], sampling[i], MODES[0]) for i in range(2)]
    with on_device(folder, cuda_graphs=(1,)) as (engine, device):
        found = [engine.generate(prompts[0], sampling[0], MODES[0])]
        captures = device.counts["captures"]
        found.append(engine.generate(prompts[1], sampling[1], Contrast(4, 2)))
    assert device.counts["captures"] == captures
    assert list(map(token_ids, found)) == list(map(token_ids, wanted))


@pytest.mark.parametrize("mode", [Contrast(4, 2), Original()], ids=["own head", "original head"])
def test_each_span_is_told_what_is_read_behind_it(folder, mode, monkeypatch):
    told = {}
    run_layers = MultiExitModel.run_layers

    def noted(model, hidden, start, stop, cache, batch, then=None):
        if then is not None:
            told[stop] = then
        return run_layers(model, hidden, start, stop, cache, batch, then)

    monkeypatch.setattr(MultiExitModel, "run_layers", noted)
    with on_device(folder, cuda_graphs=(1,)) as (engine, _):
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4, ignore_eos=True), mode)
        model = engine._model
        head = Head(4) if mode == Contrast(4, 2) else model.heads.original
        expected = {4: model.heads.operands(head, torch.zeros(1, 64, device="sim:0")).weight}
        if mode == Contrast(4, 2):
            expected[2] = model.blocks[2].attention.qkv.weight
    assert {stop: id(then) for stop, then in told.items()} == {
        stop: id(then) for stop, then in expected.items()
    }


def test_a_replayed_step_launches_graphs_and_nothing_else(folder):
    with on_device(folder, cuda_graphs=(1,)) as (engine, device):
        engine.add_request([1, 2, 3], GREEDY, Contrast(4, 2))
        for _ in range(3):
            engine.step()
        device.counts.clear()
        engine.step()
    # two spans of layers, and the heads
    assert device.counts.pop("replays") == 3
    assert device.counts == {"pinned copies": 1, "copies to the host": 1, "synchronisations": 1}


def test_pieces_are_captured_for_their_own_heads_and_rows(folder):
    batches = [
        ([[7]], Contrast("original", 2)),
        ([[7]], Original()),
        ([[7]], Contrast("original", 4)),
        (PROMPTS[:3], Contrast("original", 4)),
    ]
    short = SamplingParams(max_new_tokens=4, ignore_eos=True)
    alone = on_cpu(folder)
    with on_device(folder, cuda_graphs=(1, 2, 4)) as (engine, _):
        for prompts, mode in batches:
            found = engine.generate(prompts, short, mode)
            assert token_ids(found) == token_ids(alone.generate(prompts, short, mode))


@pytest.mark.parametrize("option", [{"cuda_graphs": True}, {"async_scheduling": True}])
def test_a_cpu_refuses_what_it_has_no_use_for(folder, option):
    with pytest.raises(ValueError, match="'cpu' runs steps at once; give device='cuda'"):
        on_cpu(folder, **option)


@pytest.mark.parametrize("sizes", [[], [0], [9], [True], 3, "all", "1,x"])
def test_sizes_beyond_the_batch_are_refused(sizes):
    config = SimpleNamespace(encoder=None, model_type="gpt2")
    with pytest.raises(ValueError, match="numbers of rows from 1 to max_batch_size=8"):
        pick_graph_sizes(sizes, torch.device("cuda"), config, 8)


def test_sizes_may_be_written_out():
    config = SimpleNamespace(encoder=None, model_type="gpt2")
    assert pick_graph_sizes("4,1,2", torch.device("cuda"), config, 8) == (1, 2, 4)


def test_groups_whose_heads_have_one_matrix_are_chosen_in_one_piece(folder):
    modes = [Contrast("original", 2), Original(), Contrast("original", 4), Exit(4)]
    with on_device(folder, cuda_graphs=(1, 4)) as (engine, device):
        for mode in modes:
            engine.add_request([1, 2, 3], GREEDY, mode)
        for _ in range(3):
            engine.step()
        device.counts.clear()
        engine.step()
    # spans of layers to 2 and to 4, the original head, and the head of exit 4
    assert device.counts["replays"] == 4


def test_steps_beyond_the_largest_size_run_without_graphs(folder):
    prompts = [[*prompt, 3] for prompt in PROMPTS]
    wanted = token_ids(on_cpu(folder).generate(prompts, GREEDY, Exit(2)))
    with on_device(folder, cuda_graphs=(4,)) as (engine, device):
        assert token_ids(engine.generate(prompts, GREEDY, Exit(2))) == wanted
        assert not device.counts["captures"]


@pytest.mark.parametrize(
    ("sampling", "mode"),
    [
        (SamplingParams(max_new_tokens=9, temperature=0.9, typical_p=0.8, seed=1), Original()),
        (LISTED, Contrast(4, 2)),
        (GREEDY, DoLa("low")),
        (SamplingParams(max_new_tokens=9, presence_penalty=0.5), Exit(4)),
    ],
    ids=["typical_p", "logprobs", "dola", "penalties"],
)
def test_layers_are_replayed_for_rows_whose_tokens_are_chosen_outside(folder, sampling, mode):
    prompts, kinds = [[1, 2, 3], [5, 6]], [GREEDY, sampling]
    wanted = token_ids(on_cpu(folder).generate(prompts, kinds, [Contrast(4, 2), mode]))
    with on_device(folder, cuda_graphs=(1, 2)) as (engine, device):
        assert token_ids(engine.generate(prompts, kinds, [Contrast(4, 2), mode])) == wanted
        for prompt, own, way in zip(prompts, kinds, [Contrast(4, 2), mode], strict=True):
            engine.add_request(prompt, own, way)
        for _ in range(2):
            engine.step()
        device.counts.clear()
        engine.step()
    # spans of layers, and the head of the one plain row
    assert device.counts["replays"] >= 3
    assert device.counts["synchronisations"] == 1
    assert not device.counts["waits"]


def test_rows_that_decode_are_replayed_beside_a_prompt(folder):
    wanted = token_ids(on_cpu(folder).generate([[1, 2, 3], [7] * 30], GREEDY, Contrast(4, 2)))
    with on_device(folder, cuda_graphs=(1, 2)) as (engine, device):
        names = [engine.add_request([1, 2, 3], GREEDY, Contrast(4, 2))]
        for _ in range(3):
            engine.step()
        names.append(engine.add_request([7] * 30, GREEDY, Contrast(4, 2)))
        device.counts.clear()
        engine.step()
        # the spans to 2 and to 4; the heads choose for two rows now, which is new
        assert device.counts["replays"] == 2
        assert device.counts["synchronisations"] == 1
        outputs = {}
        while engine.has_unfinished():
            outputs |= {output.request_id: output for output in engine.step()}
    assert token_ids([outputs[name] for name in names]) == wanted


def test_preempted_and_cached_sequences_give_the_ids_of_the_cpu(folder):
    prompts = [[*range(16), i] for i in range(4)]
    options = {"kv_cache_memory": 9 * 4 * 2 * 4 * 64 * 4, "block_size": 4, "max_model_len": 32}
    wanted = token_ids(on_cpu(folder, **options).generate(prompts, GREEDY, Contrast(4, 2)))
    with on_device(folder, cuda_graphs=(1, 2, 4), **options) as (engine, _):
        assert token_ids(engine.generate(prompts, GREEDY, Contrast(4, 2))) == wanted
        stats = engine.stats()
    assert stats.num_preemptions
    assert stats.prefix_hit_tokens


def test_sizes_grow_by_eight_and_hold_the_largest_batch():
    assert graph_sizes(1) == (1,)
    assert graph_sizes(3) == (1, 2, 3)
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20)


def test_keys_are_bounded_by_a_power_of_two_within_the_model():
    graphs = Graphs((4,), 1000, capture=lambda call: call)
    assert [graphs.bound(n) for n in (1, 256, 257, 513, 1000)] == [256, 256, 512, 1000, 1000]
    assert [key_bounds(n) for n in (64, 256, 257, 1024)] == [
        (64,), (256,), (256, 257), (256, 512, 1024)
    ]  # fmt: skip


@pytest.mark.parametrize("mode", [Contrast(4, 2), Exit(2), DoLa("low")], ids=str)
def test_a_warm_engine_captures_nothing_more_in_its_mode(folder, mode):
    wanted = token_ids(on_cpu(folder).generate(PROMPTS, SAMPLING, mode))
    with on_device(folder, cuda_graphs=(1, 2, 4, 8), max_model_len=64) as (engine, device):
        engine.warm_up(mode)
        captures = device.counts["captures"]
        assert token_ids(engine.generate(PROMPTS, SAMPLING, mode)) == wanted
        assert device.counts["captures"] == captures > 0
        assert device.counts["replays"]


def test_there_is_nothing_to_warm_up_without_graphs(folder):
    with pytest.raises(ValueError, match="give cuda_graphs=True as well"):
        on_cpu(folder, warm_up=True)
