"""What goes over a stream's connection."""

import json

import pytest

from multiexit_engine.serve.connection import EventEnvelope, event

HEAD = {"id": "cmpl-1", "model": 'a "quoted" é'}


@pytest.mark.parametrize("tail", [{}, {"usage": None}])
@pytest.mark.parametrize("value", [[], [{"index": 0, "text": "h\u00e9\n"}]])
def test_an_envelope_writes_what_the_whole_event_would_be(tail, value):
    found = EventEnvelope(HEAD, "choices", tail).event(value)
    assert found == event(HEAD | {"choices": value} | tail)
    assert json.loads(found.removeprefix(b"data: ")) == HEAD | {"choices": value} | tail
