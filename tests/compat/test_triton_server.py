"""The model repository for Triton Inference Server, run on a stub of its python backend."""

import json
import re
import runpy
import time
from pathlib import Path

import pytest

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams
from tests.compat import triton_stub
from tests.compat.pages import Page
from tests.compat.triton_stub import InferenceRequest, TritonError

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "triton" / "multiexit"
OPTIONS = json.dumps({"dtype": "float32", "device": "cpu"})
PROMPT = "The old house"
MODES = {
    "original": Original(),
    "exit:6": Exit(6),
    '{"mode": "contrast", "upper": 8, "lower": 4}': Contrast(8, 4),
}


@pytest.fixture(scope="module")
def model_class():
    with pytest.MonkeyPatch.context() as patch:
        triton_stub.install(patch)
        yield runpy.run_path(str(FOLDER / "1" / "model.py"))["TritonPythonModel"]


def config(**parameters):
    values = {name: {"string_value": value} for name, value in parameters.items()}
    return {"model_config": json.dumps({"parameters": values})}


@pytest.fixture(scope="module")
def model(model_class):
    model = model_class()
    model.initialize(config(model="demo", options=OPTIONS))
    yield model
    model.finalize()


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("demo", dtype="float32", device="cpu")


def ids(results):
    return [int(token) for result in results for token in result["TOKEN_IDS"]]


def text(results):
    return b"".join(result["TEXT"][0] for result in results).decode()


def sampling(**fields):
    return json.dumps(fields)


@pytest.mark.parametrize("streamed", [False, True])
def test_concurrent_requests_of_different_modes_give_the_engines_answers(model, engine, streamed):
    requests = [
        InferenceRequest(
            PROMPT=PROMPT, DECODING=mode, SAMPLING=sampling(max_new_tokens=12), STREAM=streamed
        )
        for mode in MODES
    ]
    assert model.execute(requests) is None
    for request, mode in zip(requests, MODES.values(), strict=True):
        (wanted,) = engine.generate([PROMPT], SamplingParams(max_new_tokens=12), mode)
        (output,) = wanted.outputs
        assert ids(request.results()) == output.token_ids
        assert text(request.results()) == output.text


def test_a_stream_comes_in_many_pieces_of_which_the_last_says_why_it_ended(model):
    request = InferenceRequest(PROMPT=PROMPT, SAMPLING=sampling(max_new_tokens=12), STREAM=True)
    model.execute([request])
    reasons = [result["FINISH_REASON"][0] for result in request.results()]
    assert len(reasons) > 5
    assert reasons[-1] == b"length"
    assert set(reasons[:-1]) == {b""}


def test_token_ids_can_stand_for_the_prompt(model, engine):
    request = InferenceRequest(PROMPT_TOKEN_IDS=[464, 100, 20], DECODING="exit:4")
    model.execute([request])
    (wanted,) = engine.generate([[464, 100, 20]], SamplingParams(), Exit(4))
    (result,) = request.results()
    assert ids([result]) == wanted.outputs[0].token_ids
    assert set(result["EXIT_LAYERS"]) == {4}


def test_several_continuations_are_answers_of_their_own(model):
    asked = sampling(max_new_tokens=4, n=3, temperature=1.0, seed=1)
    request = InferenceRequest(PROMPT=PROMPT, SAMPLING=asked)
    model.execute([request])
    assert [result["INDEX"][0] for result in request.results()] == [0, 1, 2]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cancelled_request_ends_at_once_and_frees_its_blocks(model, streamed):
    asked = sampling(max_new_tokens=490, ignore_eos=True)
    request = InferenceRequest(PROMPT=PROMPT, SAMPLING=asked, STREAM=streamed)
    request.sender.cancelled.set()
    model.execute([request])
    assert request.error().code() == TritonError.CANCELLED
    until = time.monotonic() + 10
    while model._engine.stats().num_running and time.monotonic() < until:
        time.sleep(0.01)
    assert model._engine.stats().num_running == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "PROMPT and PROMPT_TOKEN_IDS: give one of them"),
        ({"PROMPT": "A", "PROMPT_TOKEN_IDS": [1]}, "give one of them"),
        ({"PROMPT": "A", "DECODING": "exit:5"}, "exits at layers 2, 4, 6, 8"),
        ({"PROMPT": "A", "DECODING": "sideways"}, "sideways"),
        ({"PROMPT": "A", "SAMPLING": '{"warmth": 1}'}, "warmth"),
        ({"PROMPT": "A", "SAMPLING": "[]"}, "give a JSON object"),
        ({"PROMPT": "A", "SAMPLING": "{"}, "Expecting"),
    ],
)
def test_a_wrong_request_is_refused_by_name_beside_a_good_one(model, inputs, message):
    wrong, good = InferenceRequest(**inputs), InferenceRequest(PROMPT=PROMPT)
    model.execute([wrong, good])
    assert message in wrong.error().message()
    assert wrong.error().code() == TritonError.INVALID_ARG
    assert len(ids(good.results())) > 0


def test_unloading_ends_requests_that_run(model_class):
    model = model_class()
    model.initialize(config(model="demo", options=OPTIONS))
    asked = sampling(max_new_tokens=490, ignore_eos=True)
    request = InferenceRequest(PROMPT=PROMPT, SAMPLING=asked, STREAM=True)
    model.execute([request])
    assert request.sender.first.wait(30)
    model.finalize()
    assert "shut down" in request.error().message()


@pytest.mark.parametrize("parameters", [{}, {"model": "demo", "speed": "9"}])
def test_parameters_are_refused_by_name(model_class, parameters):
    with pytest.raises(ValueError, match="'model'"):
        model_class().initialize(config(**parameters))


def test_the_configuration_names_what_the_model_reads_and_sends(model):
    text = (FOLDER / "config.pbtxt").read_text()
    request = InferenceRequest(PROMPT=PROMPT)
    model.execute([request])
    names = re.findall(r'\{ name: "(\w+)"', text)
    assert names[5:] == list(request.results()[0])
    assert names[:5] == ["PROMPT", "PROMPT_TOKEN_IDS", "DECODING", "SAMPLING", "STREAM"]
    assert "decoupled: true" in text


def test_the_page_names_every_tensor():
    text = Page("triton.md").text
    names = re.findall(r'\{ name: "(\w+)"', (FOLDER / "config.pbtxt").read_text())
    assert all(f"`{name}`" in text for name in names)
