"""/v1/chat/completions, tokenize and detokenize."""

import pytest
from openai import BadRequestError

from multiexit_engine import Engine, SamplingParams
from tests.serve.running import serving

MESSAGES = [
    {"role": "system", "content": "You tell stories."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "The old "}, {"type": "text", "text": "house"}],
    },
]
WRITTEN = "system: You tell stories.\nuser: The old house\nassistant:"


def test_a_chat_is_the_completion_of_its_template(client, engine):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_completion_tokens=12, temperature=0
    )
    (wanted,) = engine.generate(WRITTEN, SamplingParams(max_new_tokens=12))
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", wanted.outputs[0].text)
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answer.id.startswith("chatcmpl-")


def test_a_chat_without_a_length_fills_the_context(client, engine):
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, seed=1)
    assert answer.usage.total_tokens <= engine.config.max_model_len
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == engine.config.max_model_len


def test_a_streamed_chat_adds_up(client):
    options = dict(model="demo", messages=MESSAGES, max_tokens=10, temperature=0)
    whole = client.chat.completions.create(**options)
    deltas = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
    assert "".join(d.delta.content for d in deltas) == whole.choices[0].message.content
    assert [d.delta.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"


def test_chat_logprobs_have_alternatives_and_bytes(client):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode() == token.token


def test_top_logprobs_need_logprobs(client):
    with pytest.raises(BadRequestError, match="only together with logprobs=true"):
        client.chat.completions.create(model="demo", messages=MESSAGES, top_logprobs=2)


def test_tools_are_refused_by_name(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(BadRequestError, match="tools: .* response_format gives answers in JSON"):
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=[tool])


def test_images_are_refused(client):
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(BadRequestError, match="messages: "):
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": [image]}]
        )


def test_a_model_without_a_template_says_so(http):
    with serving(Engine.from_pretrained("demo", kv_cache_memory=2**24)) as running:
        response = http.post(
            running.url + "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Hi"}]},
        )
    assert response.status_code == 400
    assert "no chat template: use /v1/completions" in response.json()["error"]["message"]


def test_tokenize_and_detokenize_are_inverse(http, engine):
    text = "The old house stood."
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == engine.tokenizer(text)["input_ids"]
    assert "".join(answer["token_strs"]) == text
    assert answer["max_model_len"] == 512
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}


def test_a_chat_can_be_tokenized(http, engine):
    answer = http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert answer["tokens"] == engine.tokenizer(WRITTEN)["input_ids"]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("/tokenize", {}, "give one of them"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": False}, "template writes them"),
        ("/detokenize", {"tokens": [4096]}, "token ids of this model are 0..4095"),
        ("/detokenize", {"tokens": "a"}, "tokens: "),
    ],
)
def test_wrong_bodies_are_refused(http, path, body, message):
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_the_model_tells_its_exits(client):
    (model,) = client.models.list().data
    assert (model.id, model.exit_layers, model.max_model_len) == ("demo", [2, 4, 6, 8], 512)
    assert client.models.retrieve("demo").id == "demo"
