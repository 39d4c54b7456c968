"""Answers of a given form, under OpenAI's names and vLLM's."""

import json
import re

import pytest
from openai import BadRequestError
from pydantic import BaseModel, Field

from tests.serve.running import events_of

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["kind", "age"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Which animal?"}]
NAMED = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
FORMS = {
    "response_format": (NAMED, None),
    "structured_outputs": ({"json": SCHEMA}, None),
    "guided_json": (json.dumps(SCHEMA), None),
    "guided_regex": ("[a-d]{5}", r"[a-d]{5}"),
    "guided_choice": (["yes", "no"], "yes|no"),
    "guided_grammar": ('root ::= "(" ("a" | "b") ")"', r"\((a|b)\)"),
}


def is_pet(text):
    pet = json.loads(text)
    return pet.keys() == {"kind", "age"} and pet["kind"] in ("cat", "dog") and pet["age"] <= 99


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_answers_have_the_form_that_was_asked_for(http, path, name, temperature):
    form, pattern = FORMS[name]
    start = {"messages": MESSAGES} if "chat" in path else {"prompt": "A"}
    body = start | {name: form, "max_tokens": 60, "temperature": temperature, "seed": 3}
    (choice,) = http.post(path, json=body).json()["choices"]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(pattern, text) if pattern else is_pet(text), text


def test_the_client_parses_answers_into_classes(client):
    class Pet(BaseModel):
        kind: str = Field(max_length=5)
        age: int = Field(ge=0, le=99)

    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Pet, max_tokens=60, temperature=1, seed=2
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_any_object_may_be_asked_for(client):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format={"type": "json_object"}, seed=1, n=4
    )
    whole = [c.message.content for c in answer.choices if c.finish_reason == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in whole)
    assert all(choice.message.content.startswith("{") for choice in answer.choices)


def test_plain_text_may_be_asked_for(client):
    options = dict(model="demo", messages=MESSAGES, max_tokens=8, temperature=0)
    plain = client.chat.completions.create(**options)
    text = client.chat.completions.create(**options, response_format={"type": "text"})
    assert text.choices[0].message.content == plain.choices[0].message.content


def test_every_mode_and_a_stream_keep_the_form(http):
    for mode in (
        {"mode": "exit", "layer": 4},
        {"mode": "contrast", "upper": 8, "lower": 4},
        {"mode": "dola", "candidates": [0, 2, 4]},
        {"mode": "self_speculative", "draft_exit": 4, "draft_len": 3},
    ):
        body = {"prompt": ["A", "The"], "guided_json": SCHEMA, "decoding": mode, "stream": True}
        response = http.post("/v1/completions", json=body | {"max_tokens": 60, "seed": 4})
        texts = ["", ""]
        for event in events_of(response.text):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert all(map(is_pet, texts)), (mode, texts)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"guided_regex": "a", "guided_choice": ["b"]},
            "guided_regex, guided_choice: give one of them",
        ),
        ({"structured_outputs": {}}, "structured_outputs: nothing given"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp: unknown field"),
        ({"guided_json": "{"}, "guided_json.json: the text is not JSON"),
        ({"guided_regex": "(a"}, "structured_outputs.regex: .*unclosed group"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos=True"),
        ({"guided_regex": "a", "num_beams": 2}, "num_beams=2"),
        ({"response_format": {"type": "xml"}}, "response_format: .*json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format: Field required"),
    ],
)
def test_a_wrong_form_is_named(http, fields, message):
    response = http.post("/v1/completions", json={"prompt": "A"} | fields)
    assert response.status_code == 400
    assert re.search(message, response.json()["error"]["message"]), response.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_the_other_parameters_forbid_is_the_clients_error(http, stream):
    body = {"prompt": "A", "guided_regex": "b+", "bad_words": ["b"], "stream": stream}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == (200 if stream else 400)
    assert '"code":"no_token_left"' in response.text
    assert '"type":"invalid_request_error"' in response.text


def test_the_client_sees_why_a_schema_is_refused(client):
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(BadRequestError, match="structured_outputs.json: .*nonsense"):
        client.chat.completions.create(model="demo", messages=MESSAGES, response_format=wrong)
