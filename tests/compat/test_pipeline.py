"""transformers' text-generation pipeline with the engine beneath."""

import logging

import pytest
from transformers import pipeline

from multiexit_engine import (
    AutoMultiExitModel,
    Contrast,
    Engine,
    MultiExitConfiguration,
    SamplingParams,
)
from tests.compat.pages import Page

PROMPTS = ["The old house", "She opened the letter and", "A"]
EXITS = MultiExitConfiguration(
    vocab_projection_mode="SHARED_PROJECTION_CAST_OUTPUTS",
    use_original_head=False,
    contrast_layer_indices=(8, 4),
)


@pytest.fixture(scope="module")
def model():
    return AutoMultiExitModel.from_pretrained("demo", EXITS, device_map="cpu")


@pytest.fixture
def writer(model):
    writer = pipeline("text-generation", model=model, tokenizer=model.engine.tokenizer)
    writer.tokenizer.pad_token_id = model.config.eos_token_id
    return writer


@pytest.fixture(scope="module")
def wanted():
    engine = Engine.from_pretrained("demo", dtype="float32", device="cpu")
    outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=14), Contrast(8, 4))
    return [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_its_token_ids_are_the_engines(writer, wanted, batch_size):
    found = writer(
        PROMPTS, max_new_tokens=14, do_sample=False, return_tensors=True, batch_size=batch_size
    )
    pad = writer.tokenizer.pad_token_id
    ids = [list(answer[0]["generated_token_ids"]) for answer in found]
    assert [[token for token in row if token != pad] for row in ids] == [
        [token for token in row if token != pad] for row in wanted
    ]


def test_it_gives_only_the_new_text_when_asked(writer, wanted):
    ((answer,),) = writer(PROMPTS[:1], max_new_tokens=14, do_sample=False, return_full_text=False)
    assert PROMPTS[0] + answer["generated_text"] == writer.tokenizer.decode(wanted[0])


def test_it_samples_several_texts(writer):
    (answers,) = writer(
        PROMPTS[:1], max_new_tokens=8, num_return_sequences=3, do_sample=True, temperature=1.5
    )
    assert len({answer["generated_text"] for answer in answers}) == 3


def test_it_knows_the_model(model, caplog):
    with caplog.at_level(logging.ERROR, "transformers"):
        pipeline("text-generation", model=model, tokenizer=model.engine.tokenizer)
    assert not caplog.records


def test_it_can_be_shown(writer):
    assert "MultiExitForCausalLM" in repr(writer)


def test_an_option_that_the_engine_lacks_is_refused_by_name(writer):
    with pytest.raises((ValueError, TypeError), match="unknown option 'tokenizer'"):
        writer("The", max_new_tokens=3, stop_sequence=" the")


def test_the_pages_program_continues_its_prompts(capsys):
    Page("transformers.md").run_program()
    printed = capsys.readouterr().out
    assert "The old house" in printed and "She opened the letter" in printed
