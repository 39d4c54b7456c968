"""Outputs of ELMER's own code, reproduced: ids and exit layers exactly, logits within rounding.

elmer/*/soft.safetensors comes from its fine-tuning code, hard_prescribed from its pre-training one,
hard_conf from a float64 reference that was checked against the latter. Their metadata say more.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multiexit_engine import Engine, Parallel, SamplingParams

FOLDER = Path(__file__).with_name("elmer")
SETS = ("t1", "t2")
TOLERANCE = 2e-4
PATTERNS = ("rand", "early", "layer0", "last", "rowwise")
MEASURES = {"maxprob": "max_prob", "entropy": "entropy"}
CONFIDENCE = [
    (name, case["name"])
    for name in SETS
    for case in json.loads((FOLDER / name / "hard_conf.json").read_text())["cases"]
]


@pytest.fixture(scope="module", params=["reference", "native"])
def engines(request):
    return {
        name: Engine.from_pretrained(FOLDER / name, dtype="float32", backend=request.param)
        for name in SETS
    }


def golden(name, file):
    return load_file(FOLDER / name / f"{file}.safetensors")


def sources(data):
    rows = zip(data["input_ids"], data["attention_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in rows]


def target_lens(name):
    """Of the variant that masks the ends of the targets: the same as shorter ones."""
    return golden(name, "soft")["decmask"].sum(1).tolist()


def assert_reproduced(engine, data, modes, ids, exit_layers=None, logits=None):
    """All sources in one batch give these ids and 0-based exit layers, each alone these logits."""
    found = engine.generate(sources(data), SamplingParams(ignore_eos=True), modes)
    assert len(found) == len(ids)
    for row, output in enumerate(found):
        completion = output.outputs[0]
        count = len(completion.token_ids)
        assert completion.token_ids == ids[row, :count].tolist()
        if exit_layers is not None:
            assert completion.exit_layers == (exit_layers[row, :count] + 1).tolist()
        if logits is not None:
            own = engine.logits(output.prompt_token_ids, modes[row])
            torch.testing.assert_close(own, logits[row, :count], atol=TOLERANCE, rtol=0)
    return [len(output.outputs[0].token_ids) for output in found]


@pytest.mark.parametrize("name", SETS)
def test_soft(engines, name):
    data = golden(name, "soft")
    modes = [Parallel("soft", length=data["ids"].shape[1])] * len(data["ids"])
    assert_reproduced(engines[name], data, modes, data["ids"], logits=data["logits"])


@pytest.mark.parametrize("name", SETS)
def test_soft_with_targets_of_different_lengths(engines, name):
    data = golden(name, "soft")
    modes = [Parallel("soft", length=length) for length in target_lens(name)]
    lens = assert_reproduced(
        engines[name], data, modes, data["decmask_ids"], logits=data["decmask_logits"]
    )
    assert lens == target_lens(name)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_prescribed(engines, name, pattern):
    data = golden(name, "hard_prescribed")
    layers, ids = data[f"{pattern}.exit_layers"], data[f"{pattern}.ids"]
    modes = [Parallel("prescribed", layers=(row + 1).tolist()) for row in layers]
    assert_reproduced(engines[name], data, modes, ids, layers, data[f"{pattern}.logits"])


@pytest.mark.parametrize("name", SETS)
def test_no_exit_is_the_last_layer_for_all(engines, name):
    data = golden(name, "hard_prescribed")
    modes = [Parallel(length=data["labels"].shape[1])] * len(data["labels"])
    layers, logits = data["last.exit_layers"], data["last.logits"]
    assert_reproduced(engines[name], data, modes, data["last.ids"], layers, logits)


@pytest.mark.parametrize(("name", "case"), CONFIDENCE)
def test_confidence(engines, name, case):
    data = golden(name, "hard_conf")
    cases = json.loads((FOLDER / name / "hard_conf.json").read_text())["cases"]
    meta = next(each for each in cases if each["name"] == case)
    engine, ids = engines[name], data[f"{case}.ids"]
    lens = target_lens(name) if case == "decmask" else [ids.shape[1]] * len(ids)
    first, last = meta.get("min_layer", 0) + 1, engine.model_config.num_layers
    modes = [
        Parallel(
            "confidence",
            MEASURES[meta["rule"]],
            meta["threshold"],
            layers=tuple(range(first, last + 1)),
            length=length,
            gate_bias=meta.get("use_bias", True),
        )
        for length in lens
    ]
    layers, logits = data[f"{case}.exit_layers"], data.get(f"{case}.logits")
    assert assert_reproduced(engine, data, modes, ids, layers, logits) == lens
    if "truncated" in meta:
        cut = engine.generate(sources(data), SamplingParams(), modes)
        assert [_without_end(output.outputs[0]) for output in cut] == meta["truncated"]


def _without_end(completion):
    ids = completion.token_ids
    return ids[:-1] if completion.finish_reason == "stop" else ids
