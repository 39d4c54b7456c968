"""Batches of prompts: the callable alone, and under real Ray Data as on the door's page."""

import contextlib
import io

import numpy as np
import pytest

from multiexit_engine import Contrast, SamplingParams
from multiexit_engine.serve.ray_data import BatchGenerator
from tests.compat.pages import Page
from tests.serve.local_ray import local_ray

PROMPTS = ["The old house", "The sea", "She opened the letter and"]
SAMPLING = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def generator():
    return BatchGenerator("demo", SAMPLING, Contrast(8, 4), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def wanted(engine):
    return [out.outputs[0] for out in engine.generate(PROMPTS, SAMPLING, Contrast(8, 4))]


def test_a_batch_gains_the_engines_texts_and_ids(generator, wanted):
    answers = generator({"prompt": np.array(PROMPTS, dtype=object), "number": np.arange(3)})
    assert answers["text"] == [output.text for output in wanted]
    assert [list(ids) for ids in answers["token_ids"]] == [output.token_ids for output in wanted]
    assert list(answers["number"]) == [0, 1, 2]


def test_prompts_may_be_token_ids(generator, engine, wanted):
    ids = np.empty(1, dtype=object)
    ids[0] = np.array(engine.tokenizer(PROMPTS[0])["input_ids"])
    assert generator({"prompt": ids})["text"] == [wanted[0].text]


def test_a_prompt_that_cannot_be_run_harms_no_other(generator, wanted):
    prompts = np.empty(2, dtype=object)
    prompts[:] = [[10**9], PROMPTS[1]]
    answers = generator({"prompt": prompts})
    assert "1000000000" in answers["error"][0] and answers["finish_reason"][0] == "error"
    assert answers["error"][1] == "" and answers["text"][1] == wanted[1].text


def test_a_row_has_one_text():
    with pytest.raises(ValueError, match="n=2.*repeat the rows"):
        BatchGenerator("demo", SamplingParams(n=2, temperature=1.0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_pages_program_prints_the_engines_texts(wanted):
    pytest.importorskip("ray.data", reason="needs the extra 'ray'")
    printed = io.StringIO()
    with local_ray(), contextlib.redirect_stdout(printed):
        Page("ray.md").run_program(1)
    for prompt, output in zip(PROMPTS[:2], wanted[:2], strict=True):
        assert prompt + output.text in printed.getvalue()
