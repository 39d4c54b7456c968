"""How a request's beginning chooses its replica; without a cluster."""

import json

import pytest

pytest.importorskip("ray.serve", reason="needs the extra 'ray'")

from multiexit_engine.serve.ray_app import RayOptions, build
from multiexit_engine.serve.ray_routing import by_preference, prefix_key

LONG = "The old house stood at the end of the road. " * 8


def key(prompt, path="/v1/completions", **fields):
    return prefix_key(path, json.dumps({"prompt": prompt} | fields).encode(), 32)


def chat(*contents):
    messages = [{"role": "user", "content": content} for content in contents]
    body = json.dumps({"messages": messages}).encode()
    return prefix_key("/v1/chat/completions", body, 32)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (key(LONG + "He"), key(LONG + "She", max_tokens=3)),
        (key(list(range(40))), key([*range(32), 7])),
        (key([LONG, "He"]), key(LONG)),
        (chat(LONG, "And then?"), chat(LONG, "Who?")),
    ],
)
def test_what_follows_the_prefix_does_not_matter(first, second):
    assert first == second is not None


def test_other_beginnings_have_other_keys():
    assert len({key("The sea"), key("The house"), key([1, 2]), key([12]), chat("The sea")}) == 5


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'{"prompt": []}', b'{"messages": [{}]}'])
def test_a_wrong_body_is_left_to_the_server(body):
    assert prefix_key("/v1/completions", body, 32) is None


def test_a_page_without_a_prompt_has_no_key():
    assert key("The sea", path="/tokenize") is None


def test_only_the_keys_of_a_lost_replica_move():
    names = ["a", "b", "c"]
    for number in range(100):
        order = by_preference(str(number), names)
        assert by_preference(str(number), ["a", "c"]) == [name for name in order if name != "b"]


def test_keys_are_spread_evenly():
    first = [by_preference(str(number), ["a", "b"])[0] for number in range(1000)]
    assert 430 < first.count("a") < 570


def test_rays_own_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="'port' is Ray Serve's"):
        build(RayOptions(server={"port": 80}))


def test_an_application_is_built_from_the_shells_words():
    """As `serve run` hands them over."""
    build({"model": "demo", "num_replicas": "2", "decoding": "exit:6"})
    with pytest.raises(ValueError, match="num_replica\n"):
        build({"num_replica": "2"})
