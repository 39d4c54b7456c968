"""What the load's clients measure."""

import asyncio

import pytest
from http_clients import Figures, Stream, arriving, together
from report import quantile

from multiexit_engine import Engine
from tests.serve.running import serving


@pytest.fixture(scope="module")
def port():
    with serving(Engine.from_pretrained("demo", kv_cache_memory=2**24)) as running:
        yield int(running.url.rpartition(":")[2])


def bodies(count, **more):
    more = {"stream_options": {"include_usage": True}, "ignore_eos": True} | more
    return [
        {"prompt": f"Number {i}", "max_tokens": 6, "temperature": 0} | more for i in range(count)
    ]


def test_all_streams_are_followed_to_their_end(port):
    for load in (together(port, bodies(5), 2), arriving(port, bodies(5), 100.0)):
        streams = asyncio.run(load)
        figures = Figures.of(streams, 6)
        assert len(streams) == 5 and all(one.num_tokens == 6 for one in streams)
        assert 0 < figures.itl_s["p50"] <= figures.itl_s["p99"]
        assert figures.tokens_per_s == pytest.approx(30 / figures.seconds)


def test_an_error_is_raised(port):
    with pytest.raises(RuntimeError, match="min_p: "):
        asyncio.run(together(port, bodies(1, min_p=2.0), 1))


def test_short_streams_are_no_figures():
    with pytest.raises(RuntimeError, match=r"streams of \[3\] tokens instead of 4"):
        Figures.of([Stream(0.0, [1.0, 2.0], num_tokens=3)], 4)


def test_a_quantile_is_one_of_the_values():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(values, share) for share in (0.2, 0.5, 0.95, 1.0)] == [1.0, 3.0, 5.0, 5.0]
