"""What stands before the handlers: keys, limits, ids, CORS, logs."""

import json
import logging

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from multiexit_engine import Engine
from multiexit_engine.serve.logs import JsonLines
from multiexit_engine.serve.settings import ServerSettings, read_api_keys
from tests.serve.running import serving

BODY = {"prompt": "The old", "max_tokens": 3}


@pytest.fixture(scope="module")
def guarded():
    """A server with two keys, short bodies, and one foreign page."""
    loaded = Engine.from_pretrained("demo", kv_cache_memory=2**24)
    with serving(
        loaded,
        api_key=("first-key", "second-key"),
        max_body_bytes=2000,
        max_prompts=3,
        allow_origin=("https://pages.example",),
    ) as running:
        yield running


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_every_key_opens(guarded, key):
    with OpenAI(base_url=guarded.url + "/v1", api_key=key) as client:
        assert client.completions.create(model="demo", **BODY).usage.completion_tokens == 3


@pytest.mark.parametrize("key", ["first-ke", "first-keyy", "first", "ключ"])
def test_any_other_key_does_not(guarded, key):
    headers = {"authorization": f"Bearer {key}".encode()}
    response = httpx.post(guarded.url + "/v1/completions", json=BODY, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_client_sees_an_authentication_error(guarded):
    with (
        OpenAI(base_url=guarded.url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/tokenize", "/nope"])
def test_all_that_tells_something_needs_a_key(guarded, path):
    assert httpx.get(guarded.url + path).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/version"])
def test_health_needs_no_key(guarded, path):
    assert httpx.get(guarded.url + path).status_code == 200


def test_long_bodies_are_refused(guarded):
    headers = {"authorization": "Bearer first-key"}
    body = {"prompt": "a" * 3000}
    response = httpx.post(guarded.url + "/v1/completions", json=body, headers=headers)
    assert response.status_code == 413
    assert "longer than 2000 bytes" in response.json()["error"]["message"]


def test_long_bodies_without_a_length_are_refused(guarded):
    def chunks():
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"a" * 100
        yield b'"}'

    headers = {"authorization": "Bearer first-key", "content-type": "application/json"}
    response = httpx.post(guarded.url + "/v1/completions", content=chunks(), headers=headers)
    assert response.status_code == 413


def test_too_many_prompts_are_refused(guarded):
    headers = {"authorization": "Bearer first-key"}
    response = httpx.post(
        guarded.url + "/v1/completions", json={"prompt": ["a"] * 4}, headers=headers
    )
    assert response.status_code == 400
    assert "at most 3 are allowed" in response.json()["error"]["message"]


def test_a_listed_page_may_call_and_no_other(guarded):
    def allowed(origin):
        headers = {"origin": origin, "authorization": "Bearer first-key"}
        response = httpx.get(guarded.url + "/v1/models", headers=headers)
        return response.headers.get("access-control-allow-origin")

    assert allowed("https://pages.example") == "https://pages.example"
    assert allowed("https://evil.example") is None


def test_without_a_setting_no_page_may_call(http):
    response = http.get("/v1/models", headers={"origin": "https://pages.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_request_id_comes_back(http):
    response = http.post("/v1/completions", json=BODY, headers={"x-request-id": "my-id_1.2"})
    assert response.headers["x-request-id"] == "my-id_1.2"
    assert response.json()["id"] == "cmpl-my-id_1.2"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "naïve".encode()])
def test_a_strange_request_id_is_replaced(http, given):
    response = http.get("/health", headers={"x-request-id": given})
    assert len(response.headers["x-request-id"]) == 32


def test_errors_have_a_request_id_too(http):
    assert http.get("/nope").headers["x-request-id"]
    assert http.get("/nope").json()["error"]["message"] == "GET /nope: Not Found"


def test_a_handler_that_breaks_answers_500_and_tells_nothing(http, server, monkeypatch, caplog):
    def broken(*_args, **_options):
        raise KeyError("secret")

    monkeypatch.setattr(server.engine, "submit", broken)
    response = http.post("/v1/completions", json=BODY)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret" in caplog.text


def test_the_log_has_numbers_and_no_text(http, caplog):
    with caplog.at_level(logging.INFO):
        prompt = "A very private prompt"
        http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 3})
    lines = [JsonLines().format(record) for record in caplog.records]
    found = next(json.loads(line) for line in lines if '"request_id"' in line)
    assert found["completion_tokens"] == 3 and found["status"] == 200
    assert not any("private" in line for line in lines)


def test_prompts_are_logged_on_demand(caplog):
    loaded = Engine.from_pretrained("demo", kv_cache_memory=2**24)
    with caplog.at_level(logging.INFO), serving(loaded, log_prompts=True) as running:
        httpx.post(running.url + "/v1/completions", json=BODY | {"prompt": "A public prompt"})
    assert ["A public prompt"] in [
        record.fields["prompts"] for record in caplog.records if record.message == "prompts"
    ]


def test_keys_come_from_settings_file_and_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("b\n\n c \n")
    settings = ServerSettings(api_key=("a",), api_key_file=file)
    assert read_api_keys(settings, {"MULTIEXIT_API_KEYS": "d,e"}) == ("a", "b", "c", "d", "e")
    assert read_api_keys(ServerSettings(), {}) == ()


def test_a_source_of_keys_without_a_key_is_an_error(tmp_path):
    file = tmp_path / "keys"
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_api_keys(ServerSettings(api_key_file=file), {})
    with pytest.raises(ValueError, match="MULTIEXIT_API_KEYS holds no key"):
        read_api_keys(ServerSettings(), {"MULTIEXIT_API_KEYS": ""})
    with pytest.raises(ValueError, match="a key is empty"):
        read_api_keys(ServerSettings(api_key=("",)), {})


@pytest.mark.parametrize(
    "name, value", [("port", 70000), ("max_requests", 0), ("max_logprobs", -1)]
)
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        ServerSettings(**{name: value})
