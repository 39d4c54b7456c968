"""Captured layers that the device passes over where nobody is left: the same choices."""

from __future__ import annotations

import pytest

from multiexit_engine import EarlyExit, Engine, Original, Parallel, SamplingParams
from multiexit_engine.runtime import settings
from multiexit_engine.runtime.device import graph_parts
from tests.golden.test_elmer_golden import FOLDER
from tests.runtime.exit_models import assert_same, own_heads
from tests.runtime.on_simulated_device import on_cpu, on_device

LONG = SamplingParams(max_new_tokens=12, ignore_eos=True, confidences=True)
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20]
GRAPHS = {"cuda_graphs": (1, 2, 4), "conditional_nodes": True}
# whoever is asked leaves at once, about half leave, nobody does
EARLY = [EarlyExit(rate, kv=kv) for kv in ("recompute", "copy") for rate in (0.0, 0.3, 1.0)]
SOURCES = [[5, 6, 7, 8], [9], [20, 30, 40]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return own_heads(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.mark.parametrize("mode", EARLY, ids=str)
def test_early_exits_are_those_of_the_host(folder, mode):
    modes = [mode] * 3
    wanted = on_cpu(folder).generate(PROMPTS, LONG, modes)
    with on_device(folder, **GRAPHS) as (engine, device):
        assert_same(engine.generate(PROMPTS, LONG, modes), wanted)
        assert bool(device.counts["passed over"]) == (mode.threshold < 1)


def test_company_of_full_depth_lets_nothing_be_passed_over(folder):
    modes = [EarlyExit(0.0), Original(), EarlyExit(0.3)]
    wanted = on_cpu(folder).generate(PROMPTS, LONG, modes)
    with on_device(folder, **GRAPHS) as (engine, device):
        assert_same(engine.generate(PROMPTS, LONG, modes), wanted)
        assert not device.counts["passed over"]


@pytest.mark.parametrize("threshold", [0.0, 0.35, 1.0])
def test_answers_in_one_pass_are_those_of_the_host(threshold):
    mode, uncut = Parallel("confidence", "max_prob", threshold, length=6), SamplingParams()
    found = []
    graphs = {"cuda_graphs": (64,), "conditional_nodes": True, "has_kernels": True}
    wanted = [o.outputs[0] for o in on_cpu(FOLDER / "t1").generate(SOURCES, uncut, mode)]
    with on_device(FOLDER / "t1", **graphs) as (engine, device):
        for _ in range(2):
            found = [o.outputs[0] for o in engine.generate(SOURCES, uncut, mode)]
            assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
            assert [o.exit_layers for o in found] == [o.exit_layers for o in wanted]
        assert bool(device.counts["passed over"]) == (threshold == 0.0)


def test_without_a_capture_the_inside_runs_alone():
    done = []
    with graph_parts.only_if(otherwise=lambda: done.append("left to do")):
        done.append("inside")
    assert done == ["inside"]


def test_conditional_nodes_without_graphs_are_refused(folder):
    with pytest.raises(ValueError, match="conditional_nodes=True without graphs"):
        Engine.from_pretrained(folder, device="cpu", conditional_nodes=True)


def test_a_missing_build_is_named(monkeypatch):
    def missing(name):
        raise ImportError("the CUDA kernels are not built")

    monkeypatch.setattr(graph_parts.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"kernels are not built; or give conditional_nodes=False"):
        settings.pick_conditional_nodes(True, True)
