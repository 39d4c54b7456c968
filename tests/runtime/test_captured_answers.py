"""Answers found at once in captured passes: replays give the host's ids, exit layers and work."""

from __future__ import annotations

import json

import pytest
import torch

from multiexit_engine import Parallel, SamplingParams
from multiexit_engine.runtime.settings import check_lists_rows
from tests.gate_probes import save_probed_elmer
from tests.golden.test_elmer_golden import FOLDER, MEASURES, assert_reproduced, golden
from tests.runtime.on_simulated_device import on_cpu, on_device

GENERATOR = torch.Generator().manual_seed(5)
SOURCES = [torch.randint(3, 399, (n,), generator=GENERATOR).tolist() for n in (9, 1, 17, 6, 12)]
UNCUT = SamplingParams(ignore_eos=True)
GRAPHS = {"cuda_graphs": (16, 64), "has_kernels": True}
MIXED = [
    Parallel("soft", length=5),
    Parallel("confidence", "max_prob", 0.4, length=1.5),
    Parallel("prescribed", layers=[1, 3, 2, 1, 1]),
    Parallel("confidence", "entropy", 2.0, layers=(2,), length=(3, 8), gate_bias=False),
    Parallel("confidence", "max_prob", 0.35, length=6, refine=1),
]
EACH = [
    Parallel("none", length=6),
    Parallel("soft", length=1.2),
    Parallel("confidence", "entropy", 2.4, length=7),
    Parallel("confidence", "max_prob", 0.3, length=7, refine=2),
    Parallel("prescribed", layers=[4, 1, 2, 2, 3, 1]),
]


def answers(engine, modes, sources=SOURCES):
    """Ids, exit layers, and the work since the engine was made."""
    outputs = engine.generate(sources[: len(modes)], UNCUT, modes)
    stats = engine.stats()
    work = stats.rows_per_layer, stats.keyed_rows_per_layer, stats.tested_rows_per_layer
    return [(o.outputs[0].token_ids, o.outputs[0].exit_layers) for o in outputs], work


@pytest.fixture(scope="module")
def folder():
    return FOLDER / "t1"


def test_mixed_modes_give_the_answers_and_the_work_of_the_host(folder):
    wanted = answers(on_cpu(folder), MIXED)
    with on_device(folder, **GRAPHS) as (engine, device):
        device.counts.clear()
        assert answers(engine, MIXED) == wanted
        # nothing is a question: the passes end with one wait each, of two
        assert not device.counts["waits"]
        assert device.counts["synchronisations"] == 2
        assert device.counts["captures"]


def test_a_replayed_pass_is_its_inputs_its_graphs_and_its_results(folder):
    mode = Parallel("confidence", "max_prob", 0.4, length=5)
    with on_device(folder, **GRAPHS) as (engine, device):
        for _ in range(2):
            device.counts.clear()
            answers(engine, [mode])
    # sources, the beginning, both parts of the spans to the tested layers and the last, tokens
    assert device.counts["replays"] == 3 + 2 * 4
    assert not device.counts["captures"]
    # rows of what answers of this length begin with, and everything else
    assert device.counts["pinned copies"] == 2
    assert device.counts["copies to the host"] == device.counts["synchronisations"] == 1


@pytest.mark.parametrize("name", ["t1", "t2"])
def test_goldens_are_reproduced(name):
    with on_device(FOLDER / name, cuda_graphs=(64, 256), has_kernels=True) as (engine, device):
        data = golden(name, "soft")
        soft = [Parallel("soft", length=data["ids"].shape[1])] * len(data["ids"])
        assert_reproduced(engine, data, soft, data["ids"])
        data = golden(name, "hard_prescribed")
        layers = data["rand.exit_layers"]
        modes = [Parallel("prescribed", layers=(row + 1).tolist()) for row in layers]
        assert_reproduced(engine, data, modes, data["rand.ids"], layers)
        cases = json.loads((FOLDER / name / "hard_conf.json").read_text())["cases"]
        data = golden(name, "hard_conf")
        for case in [each for each in cases if "_" in each["name"]][::4]:
            ids, layers = data[f"{case['name']}.ids"], data[f"{case['name']}.exit_layers"]
            rule = MEASURES[case["rule"]], case["threshold"]
            modes = [Parallel("confidence", *rule, length=ids.shape[1])] * len(ids)
            assert_reproduced(engine, data, modes, ids, layers)
        assert device.counts["replays"] > device.counts["captures"]


@pytest.mark.parametrize("mode", EACH, ids=lambda mode: mode.exit + str(mode.refine or ""))
def test_what_one_batch_captured_serves_another(folder, mode):
    host = on_cpu(folder)
    with on_device(folder, **GRAPHS) as (engine, device):
        for sources in (SOURCES[:2], SOURCES[2:4], SOURCES[4:]):
            captures = device.counts["captures"]
            modes = [mode] * len(sources)
            assert answers(engine, modes, sources) == answers(host, modes, sources)
        assert device.counts["captures"] == captures
        assert device.counts["replays"]


def test_probes_hold_back_the_same_rows_as_on_the_host(tmp_path):
    folder = save_probed_elmer(tmp_path / "model")
    modes = [
        Parallel("confidence", "max_prob", 0.3, length=6, gate_chance=0.25, gate_gain=0),
        Parallel(
            "confidence", "entropy", 2.5, length=7, gate_bias=False, gate_chance=0.5, gate_gain=4
        ),
        Parallel("confidence", "max_prob", 0.3, layers=(1, 2), length=5),
    ]
    wanted = answers(on_cpu(folder), modes)
    with on_device(folder, **GRAPHS) as (engine, _):
        for _ in range(2):
            found = answers(engine, modes)
            assert found[0] == wanted[0]
    assert [2 * n for n in wanted[1][2]] == [*found[1][2]]


def test_logits_are_those_of_the_answer(folder):
    mode = Parallel("confidence", "max_prob", 0.35, length=6)
    with on_device(folder, **GRAPHS) as (engine, _):
        found = engine.logits(SOURCES[0], mode).to("cpu")
    torch.testing.assert_close(found, on_cpu(folder).logits(SOURCES[0], mode))


def test_company_and_padding_change_nothing(folder):
    mode = Parallel("confidence", "max_prob", 0.35, length=6, refine=1)
    with on_device(folder, **GRAPHS) as (engine, _):
        together, _ = answers(engine, [mode] * 5)
        alone = [answers(engine, [mode], [source])[0][0] for source in SOURCES]
    assert together == alone


def test_larger_batches_than_are_captured_run_from_python(folder):
    modes = [Parallel("confidence", "max_prob", 0.4, length=5)] * 5
    wanted = answers(on_cpu(folder), modes)
    with on_device(folder, cuda_graphs=(8,), has_kernels=True) as (engine, device):
        assert answers(engine, modes) == wanted
        assert not device.counts["captures"]


def test_quantized_weights_give_the_answers_of_the_host(folder):
    host = on_cpu(folder, quantization="int8")
    with on_device(folder, **GRAPHS, quantization="int8") as (engine, device):
        for _ in range(2):
            assert answers(engine, EACH)[0] == answers(host, EACH)[0]
        assert device.counts["replays"]


@pytest.mark.parametrize("mode", EACH, ids=lambda mode: mode.exit + str(mode.refine or ""))
def test_a_warm_engine_captures_nothing_more_in_its_mode(folder, mode):
    with on_device(folder, **GRAPHS) as (engine, device):
        engine.warm_up(mode)
        captures = device.counts["captures"]
        for sources in (SOURCES, SOURCES[:1]):
            modes = [mode] * len(sources)
            assert answers(engine, modes, sources)[0] == answers(on_cpu(folder), modes, sources)[0]
        assert device.counts["captures"] == captures > 0


def test_captures_are_counted_in_the_docs(folder):
    with on_device(folder, **GRAPHS) as (engine, device):
        engine.warm_up(Parallel("confidence", "max_prob", 0.4))
    # bounds of 256, 512 and 1024 tokens, spans to layers 1 to 4
    bounds, sizes, spans = 3, 2, 4
    assert device.counts["captures"] == spans * (bounds + sizes) + bounds + sizes + 1


def test_what_has_no_lists_of_rows_is_refused():
    with pytest.raises(ValueError, match="give backend='native', or cuda_graphs=False"):
        check_lists_rows("auto")
