"""DoLa of transformers 4.55 at batch 1, reproduced: ids, first scores, and the presets' layers.

dola/golden.json comes from make_dola_golden.py, run with that release.
"""

import json
from pathlib import Path

import pytest
import torch

from multiexit_engine import (
    AutoMultiExitModel,
    DoLa,
    Engine,
    MultiExitConfiguration,
    SamplingParams,
)
from multiexit_engine.decoding.plan import resolve_mode
from tests.golden.dola_recipe import CONFIGS, save_checkpoint

CASES = json.loads(Path(__file__).with_name("dola").joinpath("golden.json").read_text())["cases"]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dola")
    return {name: save_checkpoint(name, root / name) for name in CONFIGS}


def cases_of(checkpoint):
    return [case for case in CASES if case["checkpoint"] == checkpoint]


def mode_of(case):
    return DoLa(case["dola_layers"], jsd="reference")


def params_of(case):
    return SamplingParams(max_new_tokens=24, repetition_penalty=case["repetition_penalty"])


@BACKENDS
@pytest.mark.parametrize("checkpoint", CONFIGS)
def test_greedy_ids(folders, checkpoint, backend):
    engine = Engine.from_pretrained(
        folders[checkpoint], dtype="float32", device="cpu", backend=backend
    )
    cases = cases_of(checkpoint)
    for case in cases:
        output = engine.generate(case["prompt"], params_of(case), mode_of(case))[0]
        assert output.outputs[0].token_ids == case["token_ids"]
    together = engine.generate(
        [case["prompt"] for case in cases], list(map(params_of, cases)), list(map(mode_of, cases))
    )
    assert [o.outputs[0].token_ids for o in together] == [case["token_ids"] for case in cases]


@pytest.mark.parametrize("checkpoint", CONFIGS)
def test_greedy_ids_by_transformers_own_option(folders, checkpoint):
    model = AutoMultiExitModel.from_pretrained(
        str(folders[checkpoint]), MultiExitConfiguration(), device_map="cpu"
    )
    for case in cases_of(checkpoint):
        prompt = torch.tensor([case["prompt"]])
        names = ("dola_layers", "repetition_penalty")
        ids = model.generate(prompt, max_new_tokens=24, **{name: case[name] for name in names})
        assert ids[0, prompt.shape[1] :].tolist() == case["token_ids"]


@pytest.mark.parametrize("checkpoint", CONFIGS)
def test_scores_of_the_first_token(folders, checkpoint):
    engine = Engine.from_pretrained(folders[checkpoint], dtype="float32", device="cpu")
    for case in cases_of(checkpoint):
        if case["repetition_penalty"] == 1.0:
            scores = engine.logits(case["prompt"], mode_of(case))[-1]
            ids = scores.isfinite().nonzero()[:, 0].tolist()
            assert ids == [int(token) for token in case["first_scores"]]
            expected = torch.tensor(list(case["first_scores"].values()))
            torch.testing.assert_close(scores[ids], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("checkpoint", CONFIGS)
def test_presets_name_layers_that_transformers_takes(folders, checkpoint):
    engine = Engine.from_pretrained(folders[checkpoint], dtype="float32", device="cpu")
    for case in cases_of(checkpoint):
        heads = resolve_mode(mode_of(case), engine.model_config).candidates
        assert set(case["premature_layers"]) <= {head.layer for head in heads}
