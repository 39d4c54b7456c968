"""Requests made from the OpenAPI schema, sense and nonsense: never a 5xx, never a hang."""

import json

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from multiexit_engine import Engine
from tests.serve.running import serving

OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{name}"),
]
EXPECTED = {200, 400, 404, 405, 413}
SECONDS = 20


@pytest.fixture(scope="module")
def fuzzed(template):
    """A server whose sequences are short, so that no valid request takes long."""
    loaded = Engine.from_pretrained(
        "demo", dtype="float32", device="cpu", max_model_len=48, max_batch_size=8
    )
    with serving(loaded, chat_template=template) as running:
        yield running


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method, path", OPERATIONS)
def test_whatever_is_sent_gets_an_answer_below_500(fuzzed, method, path, count):
    schema = schemathesis.openapi.from_url(fuzzed.url + "/openapi.json")
    operation = schema[path][method]
    cases = st.one_of(
        operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
        operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
    )

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def send(case):
        response = case.call(base_url=fuzzed.url, timeout=SECONDS, session=session)
        assert response.status_code in EXPECTED, (response.status_code, response.text, case.body)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    with requests.Session() as session:
        send()
    fuzzed.wait_until_empty()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"prompt": ' + "9" * 5000 + "}",
        '{"prompt": "a", "seed": 1e400}',
        '{"prompt": "a", "temperature": NaN}',
        '{"prompt": "a", "logit_bias": {"' + "9" * 4000 + '": 1}}',
        '{"prompt": "a", "decoding": {"mode": "\\ud800"}}',
        '{"prompt": "a", "\\ud800": 1}',
        '{"prompt": "a", "stop": ["\\udc00"]}',
        '{"prompt": [[]]}',
        '{"prompt": ["a", 1]}',
        "",
        "null",
        "\x00",
    ],
)
def test_hand_made_nonsense_is_refused(fuzzed, content):
    response = requests.post(
        fuzzed.url + "/v1/completions",
        data=content.encode(),
        headers={"content-type": "application/json"},
        timeout=SECONDS,
    )
    assert response.status_code == 400, response.text
    assert json.loads(response.text)["error"]["type"] == "invalid_request_error"
