"""ELMER's goldens on the GPU's kernels, interpreted where there is no GPU."""

import json
from contextlib import nullcontext

import pytest
import torch

from multiexit_engine import Engine, Parallel
from multiexit_engine.ops import assume_device
from tests.golden.test_elmer_golden import FOLDER, MEASURES, assert_reproduced, golden

pytest.importorskip("multiexit_engine.kernels.packed_blocks")


@pytest.fixture(scope="module")
def engine():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Engine.from_pretrained(FOLDER / "t1", device=device, dtype="float32", backend="native")


def rehearsal(device):
    """The kernels of the GPU for tensors that are not on one."""
    return nullcontext() if device == "cuda" else assume_device("cuda")


def confidence_cases(every):
    cases = json.loads((FOLDER / "t1" / "hard_conf.json").read_text())["cases"]
    return [case for case in cases if "_" in case["name"]][::every]


@pytest.mark.parametrize("case", confidence_cases(5), ids=lambda case: case["name"])
def test_confidence(engine, case, device):
    data = golden("t1", "hard_conf")
    ids, layers = data[f"{case['name']}.ids"], data[f"{case['name']}.exit_layers"]
    mode = Parallel("confidence", MEASURES[case["rule"]], case["threshold"], length=ids.shape[1])
    with rehearsal(device):
        assert_reproduced(engine, data, [mode] * len(ids), ids, layers)


def test_prescribed(engine, device):
    data = golden("t1", "hard_prescribed")
    layers, ids = data["rand.exit_layers"], data["rand.ids"]
    modes = [Parallel("prescribed", layers=(row + 1).tolist()) for row in layers]
    with rehearsal(device):
        assert_reproduced(engine, data, modes, ids, layers)


def test_soft(engine, device):
    data = golden("t1", "soft")
    modes = [Parallel("soft", length=data["ids"].shape[1])] * len(data["ids"])
    with rehearsal(device):
        assert_reproduced(engine, data, modes, data["ids"])
