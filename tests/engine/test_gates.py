"""Positions are tested only where a probe beside the model finds it worth while."""

import shutil
from dataclasses import replace

import pytest
import torch

from multiexit_engine import EarlyExit, Engine, Parallel, SamplingParams
from multiexit_engine.checkpoint.probes import GATE_PROBES, read_probes, write_probes
from multiexit_engine.layers.gate_probes import GateProbes
from multiexit_engine.ops import PackedSources, PackedTexts
from tests.engine.test_parallel import SOURCES, results
from tests.gate_probes import plain_chances, save_probed_elmer
from tests.golden.test_elmer_golden import FOLDER

UNCUT = SamplingParams(ignore_eos=True)
MODES = [
    Parallel("confidence", "max_prob", 0.3, length=11, gate_chance=0.25, gate_gain=0),
    Parallel("confidence", "max_prob", 0.45, length=9, gate_chance=0.6, gate_gain=3.5),
    Parallel("confidence", "entropy", 2.5, length=8, gate_chance=0.1, gate_gain=8, gate_bias=False),
    Parallel("confidence", "entropy", 2.0, layers=(3, 1), length=12, gate_chance=0.5),
]
MIXED = [
    MODES[0],
    Parallel("soft", length=11),
    replace(MODES[1], refine=1),
    replace(MODES[3], length=(7, 12)),
    replace(MODES[0], gate_chance=None, gate_gain=None),
]


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    return save_probed_elmer(tmp_path_factory.mktemp("probed") / "model")


@pytest.fixture(scope="module", params=["reference", "native"])
def gated(request, probed):
    return Engine.from_pretrained(probed, dtype="float32", backend=request.param, max_batch_size=8)


def plain_answer(folder, engine, source, mode):
    """Ids, exit layers and tested layers: every layer on every row, and the rule as it is told."""
    model, length = engine._core.model, mode.length
    ids, exits, tested = [0] * length, [model.config.num_layers] * length, []
    with torch.inference_mode():
        encoded = model.encode(torch.tensor(source), [len(source)])
        cross, hidden = model.cross_keys_values(encoded), model.start(length).embedded
        stays = torch.ones(length, dtype=torch.bool)
        for layer, block in enumerate(model.blocks, start=1):
            read = PackedSources(cross[:, layer - 1 : layer], [len(source)], [length])
            after = block.packed(hidden, PackedTexts.whole([length]), read)
            hidden = torch.where(stays[:, None], after, hidden)
            normed, weight, bias = model.predict(hidden)
            logits = normed @ weight.T
            leaves = torch.full((length,), layer == len(model.blocks))
            if layer < len(model.blocks) and layer in (mode.layers or range(1, 9)):
                chances = plain_chances(folder, layer, normed, mode)
                asked = stays & (chances >= mode.gate_chance)
                gain = model.config.vocab_size / model.config.hidden_size
                gain = gain if mode.gate_gain is None else mode.gate_gain
                asked &= chances[asked].sum() * (len(model.blocks) - layer) >= gain
                gate = (logits + bias if mode.gate_bias else logits).softmax(-1)
                entropy, best = torch.special.entr(gate).sum(-1), gate.amax(-1)
                by_entropy = mode.measure == "entropy"
                sure = entropy <= mode.threshold if by_entropy else best >= mode.threshold
                leaves = asked & sure
                tested += [layer] * int(asked.sum())
            for row in (stays & leaves).nonzero()[:, 0].tolist():
                ids[row], exits[row] = int((logits + bias)[row].argmax()), layer
            stays &= ~leaves
    return ids, exits, tested


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_answers_and_tests_are_those_of_the_rule_as_it_is_told(probed, gated, mode):
    before = gated.stats().tested_rows_per_layer
    found = results(gated, SOURCES, mode)
    after = gated.stats().tested_rows_per_layer
    plain = [plain_answer(probed, gated, source, mode) for source in SOURCES]
    assert found == [(ids, exits) for ids, exits, _ in plain]
    tested = [layer for *_, layers in plain for layer in layers]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        tested.count(layer) for layer in range(1, 5)
    ]
    ungated = replace(mode, gate_chance=None, gate_gain=None)
    results(gated, SOURCES, ungated)
    all_tests = sum(gated.stats().tested_rows_per_layer) - sum(after)
    assert 0 < len(tested) < all_tests
    assert len({layer for _, exits in found for layer in exits}) > 1


def test_an_answer_does_not_depend_on_its_batch_mates(gated):
    together = results(gated, SOURCES, MIXED)
    assert together == [results(gated, [s], m)[0] for s, m in zip(SOURCES, MIXED, strict=True)]
    assert results(gated, SOURCES[::-1], MIXED[::-1]) == together[::-1]


def test_small_steps_give_the_same_answers(probed, gated):
    small = Engine.from_pretrained(
        probed, dtype="float32", max_batch_size=2, max_num_batched_tokens=20
    )
    assert results(small, SOURCES, MIXED) == results(gated, SOURCES, MIXED)


def test_codes_and_threads_change_no_answer(probed, monkeypatch):
    engine = Engine.from_pretrained(probed, dtype="float32", max_batch_size=8)
    monkeypatch.setattr("multiexit_engine.layers.rough_heads.LEAST_NUMBERS", 0)
    found = []
    for is_rough in (True, False):
        path = "multiexit_engine.layers.rough_heads.are_codes_fast"
        monkeypatch.setattr(path, lambda is_rough=is_rough: is_rough)
        found.append(results(engine, SOURCES, MIXED))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("measure", "threshold"), [("max_prob", 1.1), ("entropy", -0.1)], ids=["max_prob", "entropy"]
)
def test_nobody_is_tested_for_what_nobody_can_reach(gated, measure, threshold):
    before = gated.stats().tested_rows_per_layer
    mode = Parallel("confidence", measure, threshold, length=9, gate_chance=0.01)
    assert results(gated, SOURCES, mode) == results(gated, SOURCES, Parallel(length=9))
    assert gated.stats().tested_rows_per_layer == before


def test_all_are_tested_for_what_everybody_reaches(gated):
    mode = Parallel("confidence", "max_prob", 0.0, length=9, gate_chance=0.99, gate_gain=26)
    assert {layer for _, exits in results(gated, SOURCES, mode) for layer in exits} == {1}


def test_readings_are_what_a_test_would_measure(gated):
    for mode in (MODES[1], MODES[2]):
        found = gated.exit_readings(SOURCES[0], mode)
        assert found.layers == (1, 2, 3)
        assert found.states.shape[:2] == found.values.shape == (mode.length, 3)
        for place, layer in enumerate(found.layers):
            everywhere = Parallel("prescribed", layers=[layer] * mode.length)
            logits = gated.logits(SOURCES[0], everywhere)
            assert torch.equal(found.tokens[:, place], logits.argmax(-1))
            if mode.gate_bias:
                wanted = logits.softmax(-1).amax(-1)
                torch.testing.assert_close(found.values[:, place], wanted, atol=1e-5, rtol=1e-4)


def test_readings_of_a_mode_without_tests_are_refused(gated):
    with pytest.raises(ValueError, match="there is no tested layer to read"):
        gated.exit_readings(SOURCES[0], Parallel(length=3))
    with pytest.raises(ValueError, match="must be Parallel"):
        gated.exit_readings(SOURCES[0], EarlyExit(0.5))


def test_a_model_without_probes_says_how_to_make_them():
    engine = Engine.from_pretrained(FOLDER / "t1", dtype="float32")
    message = r"gate_chance at layer 1: .*gate_probes.safetensors is not there; run .*train gates`"
    with pytest.raises(ValueError, match=message):
        engine.generate(SOURCES[0], UNCUT, MODES[0])


def test_probes_of_other_weights_are_refused(probed, tmp_path):
    shutil.copytree(FOLDER / "t2", tmp_path / "other")
    shutil.copy(probed / GATE_PROBES.file_name, tmp_path / "other")
    other = Engine.from_pretrained(tmp_path / "other", dtype="float32")
    with pytest.raises(ValueError, match="made for a model with other weights; run.*train gates"):
        other.generate(SOURCES[0], UNCUT, MODES[0])


def test_only_tested_layers_need_a_probe(probed, tmp_path):
    shutil.copytree(FOLDER / "t1", tmp_path / "model")
    weights = Engine.from_pretrained(tmp_path / "model").checkpoint.weights
    known = read_probes(Engine.from_pretrained(probed).checkpoint.weights, 64, GATE_PROBES)
    write_probes(tmp_path / "model" / GATE_PROBES.file_name, {2: known[2]}, weights)
    engine = Engine.from_pretrained(tmp_path / "model", dtype="float32")
    assert results(engine, SOURCES, replace(MODES[0], layers=(2,)))
    with pytest.raises(ValueError, match=r"at layer 1: .* has probes at layers \[2\]"):
        engine.generate(SOURCES[0], UNCUT, MODES[0])


@pytest.mark.parametrize("chance", [0, 1.0, -0.1, float("nan"), "x", True])
def test_a_chance_lies_between_none_and_certain(chance):
    with pytest.raises(ValueError, match="gate_chance.*above 0 and below 1, or None"):
        Parallel("confidence", threshold=1.0, gate_chance=chance)


@pytest.mark.parametrize("gain", [-1, float("inf"), "x", True])
def test_a_gain_is_a_number_of_layers(gain):
    with pytest.raises(ValueError, match="gate_gain.*a number of layers, 0 or more, or None"):
        Parallel("confidence", threshold=1.0, gate_chance=0.5, gate_gain=gain)


def test_a_gain_needs_chances():
    with pytest.raises(ValueError, match="gate_gain.*None without gate_chance"):
        Parallel("confidence", threshold=1.0, gate_gain=1.0)


def test_answers_that_can_expect_less_than_their_gain_are_not_tested(gated):
    mode = Parallel("confidence", "max_prob", 0.3, length=11, gate_chance=0.25, gate_gain=0)
    before = sum(gated.stats().tested_rows_per_layer)
    results(gated, SOURCES, mode)
    tested = sum(gated.stats().tested_rows_per_layer) - before
    results(gated, SOURCES, replace(mode, gate_gain=8.0))
    fewer = sum(gated.stats().tested_rows_per_layer) - before - tested
    assert 0 < fewer < tested
    before = gated.stats().tested_rows_per_layer
    # 11 positions have at most three layers above each
    found = results(gated, SOURCES, replace(mode, gate_gain=34.0))
    assert gated.stats().tested_rows_per_layer == before
    assert found == results(gated, SOURCES, Parallel(length=11))


def test_probes_are_not_asked_where_all_positions_together_cannot_gain(gated, monkeypatch):
    asked, odds = [], GateProbes.odds

    def noted(self, layer, *rest):
        asked.append(layer)
        return odds(self, layer, *rest)

    monkeypatch.setattr(GateProbes, "odds", noted)
    # 11 positions have 33, 22 and 11 layers above them
    mode = Parallel("confidence", "max_prob", 1.1, length=11, gate_chance=0.25, gate_gain=12)
    results(gated, SOURCES[:1], mode)
    assert asked == [1, 2]


def test_only_confidence_has_gates():
    with pytest.raises(ValueError, match="gate_chance.*None unless exit='confidence'"):
        Parallel("none", gate_chance=0.5)


def test_the_demo_model_has_probes():
    demo = Engine.from_pretrained("demo-elmer", dtype="float32")
    verse = "And he saith unto them, Why are ye troubled?"
    mode = Parallel("confidence", threshold=0.5, length=1.1, gate_chance=0.25)
    found, exact = (
        demo.generate(verse, decoding=each)[0].outputs[0]
        for each in (mode, replace(mode, gate_chance=None, gate_gain=None))
    )
    assert found.text == exact.text
    assert sum(demo.stats().tested_rows_per_layer) > 0
