"""/v1/completions, by the real client and by hand."""

import asyncio
import json
import re

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from multiexit_engine import Contrast, Exit, SamplingParams
from tests.serve.running import events_of

PROMPT = "The old house stood"
MODES = {
    "original": (None, None),
    "exit": ({"mode": "exit", "layer": 4}, Exit(4)),
    "contrast": ({"mode": "contrast", "upper": 8, "lower": 4, "alpha": 0.2}, Contrast(8, 4, 0.2)),
}


def alone(engine, prompt, mode=None, **params):
    (output,) = engine.generate(prompt, SamplingParams(top_k=0, **params), mode)
    return output


@pytest.mark.parametrize("name", MODES)
def test_a_completion_is_what_the_engine_gives_alone(client, engine, name):
    json_form, mode = MODES[name]
    answer = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=20,
        temperature=0,
        extra_body={"decoding": json_form, "return_exits": True},
    )
    wanted = alone(engine, PROMPT, mode, max_new_tokens=20).outputs[0]
    (choice,) = answer.choices
    assert choice.text == wanted.text
    assert choice.finish_reason == "length"
    assert choice.exit_layers == wanted.exit_layers
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens == len(engine.tokenizer(PROMPT)["input_ids"])


def test_a_seed_gives_the_same_text_as_the_engine(client, engine):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=12, temperature=0.9, top_p=0.9, n=3, seed=7
    )
    wanted = alone(engine, PROMPT, max_new_tokens=12, temperature=0.9, top_p=0.9, n=3, seed=7)
    assert [c.text for c in answer.choices] == [o.text for o in wanted.outputs]
    assert [c.index for c in answer.choices] == [0, 1, 2]


def test_batches_of_texts_and_of_token_ids_give_the_same(client, engine):
    texts = [PROMPT, "She opened the letter", "In the morning"]
    ids = [engine.tokenizer(text)["input_ids"] for text in texts]
    by_text = client.completions.create(model="demo", prompt=texts, max_tokens=8, temperature=0)
    by_ids = client.completions.create(model="demo", prompt=ids, max_tokens=8, temperature=0)
    one = client.completions.create(model="demo", prompt=ids[0], max_tokens=8, temperature=0)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    assert one.choices[0].text == by_text.choices[0].text
    assert [c.text for c in by_text.choices] == [
        alone(engine, text, max_new_tokens=8).outputs[0].text for text in texts
    ]


def test_a_stream_adds_up_to_the_whole(client):
    options = dict(model="demo", prompt=[PROMPT, "He"], max_tokens=15, seed=3, n=2)
    whole = client.completions.create(**options)
    texts, reasons = [""] * 4, [None] * 4
    stream = client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunk.usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens


def test_the_async_client_streams(server, client):
    async def run():
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as openai:
            stream = await openai.completions.create(
                model="demo", prompt=PROMPT, max_tokens=10, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=10, temperature=0)
    assert asyncio.run(run()) == whole.choices[0].text


def test_exit_layers_stream_beside_the_text(http):
    body = {
        "prompt": PROMPT,
        "max_tokens": 6,
        "stream": True,
        "return_exits": True,
        "decoding": {"mode": "exit", "layer": 2},
    }
    events = events_of(http.post("/v1/completions", json=body).text)
    layers = [layer for e in events for c in e["choices"] for layer in c["exit_layers"]]
    assert layers == [2] * 6


def test_echo_with_logprobs_scores_the_prompt_as_the_harness_needs(client, engine):
    ids = engine.tokenizer(PROMPT + " at the end of the lane")["input_ids"]
    answer = client.completions.create(
        model="demo", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    found = answer.choices[0].logprobs
    (score,) = engine.score([ids])
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(score.token_logprobs[1:], abs=1e-5)
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(found.token_logprobs[1:-1], found.top_logprobs[1:-1], strict=True)
    ]
    assert greedy == score.is_greedy[1:]
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset[:2] == [0, len(found.tokens[0])]


def test_echo_without_new_tokens_gives_the_prompt_alone(client):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
    )
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_echo_streams_the_prompt_first(client):
    options = dict(model="demo", prompt=PROMPT, max_tokens=5, temperature=0, echo=True, logprobs=1)
    whole = client.completions.create(**options).choices[0]
    chunks = [c.choices[0] for c in client.completions.create(**options, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[0].text.startswith(PROMPT)
    assert sum((c.logprobs.text_offset for c in chunks), []) == whole.logprobs.text_offset
    assert sum((c.logprobs.token_logprobs for c in chunks), []) == whole.logprobs.token_logprobs


def test_best_of_returns_the_likeliest(client, engine):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=8, best_of=6, n=2, seed=5
    )
    all_six = alone(
        engine, PROMPT, max_new_tokens=8, temperature=1.0, n=6, seed=5, logprobs=0
    ).outputs
    likeliest = sorted(all_six, key=lambda o: -o.cumulative_logprob / len(o.token_ids))
    assert [c.text for c in answer.choices] == [o.text for o in likeliest[:2]]
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == sum(len(o.token_ids) for o in all_six)


def test_stop_strings_end_the_text(client, engine):
    text = alone(engine, PROMPT, max_new_tokens=30).outputs[0].text
    stop = text[10:14]
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop


def test_beam_search_gives_its_best_beams(client, engine):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=8, n=2, extra_body={"num_beams": 3}
    )
    wanted = engine.generate(PROMPT, SamplingParams(max_new_tokens=8, num_beams=3, n=2))[0]
    assert [c.text for c in answer.choices] == [o.text for o in wanted.outputs]


def test_cached_tokens_are_counted(client):
    prompt = "Once upon a time there was a little house that " * 6
    first = client.completions.create(model="demo", prompt=prompt, max_tokens=1)
    second = client.completions.create(model="demo", prompt=prompt, max_tokens=1)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens > 32


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("suffix", "x", "suffix: not supported"),
        ("nonsense", 1, "nonsense: unknown field; known are"),
        ("temperature", -1, "temperature: .*greater than or equal to 0"),
        ("max_tokens", 0, "only together with echo"),
        ("n", 0, "n: "),
        ("best_of", 2, "best_of=2: must be at least n=3"),
        ("logprobs", 21, "logprobs=21: this server allows at most 20"),
        ("decoding", {"mode": "exit", "layer": 5}, "exits at layers 2, 4, 6, 8"),
        ("decoding", {"mode": "exit", "depth": 5}, "has no field 'depth': its fields are layer"),
        ("stream_options", {"include_usage": True}, "only together with stream=true"),
        ("prompt", "", "prompt is empty"),
        ("prompt", [], "prompt is an empty list"),
        ("prompt", [[5], [99999]], r"prompts\[1\]: .*token ids of this model are 0..4095"),
        ("prompt", "a \ud800", "lone surrogate"),
        ("prompt", "word " * 600, "max_model_len=512"),
        ("logit_bias", {"x": 1.0}, "'x' is no token id"),
        ("stop", "", "stop="),
        ("n", 100, "max_batch_size=64"),
    ],
)
def test_a_wrong_field_is_named(http, name, value, message):
    body = {"model": "demo", "prompt": PROMPT, "temperature": 0.5, "n": 3} | {name: value}
    response = http.post(
        "/v1/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error


def test_errors_are_those_of_the_openai_client(client):
    with pytest.raises(BadRequestError, match="prompt is empty"):
        client.completions.create(model="demo", prompt="")
    with pytest.raises(NotFoundError, match="this server has 'demo'") as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"


def test_an_error_before_a_stream_has_its_status(client):
    with pytest.raises(BadRequestError, match="exits at layers"):
        client.completions.create(
            model="demo",
            prompt="a",
            stream=True,
            extra_body={"decoding": {"mode": "exit", "layer": 3}},
        )


def test_broken_json_is_refused(http):
    response = http.post(
        "/v1/completions", content="{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "not JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"null", b'{"prompt": "He", "max_tokens": 1}'])
def test_a_body_that_is_no_json_object_by_name_says_what_to_send(http, content):
    """As curl sends it that was not told otherwise."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_drafted_tokens_are_told_of(http, engine):
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "return_exits": True}
    mode = {"mode": "self_speculative", "draft_exit": 4, "draft_len": 3}
    whole = http.post("/v1/completions", json=body | {"decoding": mode}).json()["choices"][0]
    stream = http.post("/v1/completions", json=body | {"decoding": mode, "stream": True})
    drafted = [d for event in events_of(stream.text) for d in event["choices"][0]["drafted"]]
    assert whole["text"] == alone(engine, PROMPT, max_new_tokens=20).outputs[0].text
    assert len(drafted) == len(whole["drafted"]) == 20
    assert any(drafted) and any(whole["drafted"])
