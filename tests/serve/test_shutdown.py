"""Signals under load: drain, abort, exit."""

import asyncio
import signal

import httpx

from multiexit_engine import Engine, SamplingParams
from tests.serve.running import Process, events_of, serving

LONG = {"prompt": "The old", "max_tokens": 450, "temperature": 0, "ignore_eos": True}


async def load(server, count, *, then):
    """Starts long streams, waits until each has text, and then does something beside them."""
    begun = [asyncio.Event() for _ in range(count)]

    async def one(http, started):
        async with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            text = ""
            async for part in answer.aiter_text():
                started.set()
                text += part
            return text

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        streams = [asyncio.create_task(one(http, event)) for event in begun]
        await asyncio.gather(*[event.wait() for event in begun])
        result = await then(http)
        return await asyncio.gather(*streams), result


def text_of(stream):
    return "".join(c["text"] for event in events_of(stream) for c in event.get("choices", []))


def test_sigterm_finishes_what_runs_refuses_the_rest_and_exits_with_zero(engine):
    (wanted,) = engine.generate(LONG["prompt"], SamplingParams(max_new_tokens=450, ignore_eos=True))

    async def terminate(http):
        process.signal(signal.SIGTERM)
        answers = []
        while not answers or answers[-1].status_code == 200:
            answers.append(await http.get("/health"))
        return answers[-1], await http.post("/v1/completions", json=LONG)

    with Process("--dtype", "float32") as process:
        streams, (health, refused) = asyncio.run(load(process, 8, then=terminate))
        assert process.wait() == 0
    assert [text_of(stream) for stream in streams] == [wanted.outputs[0].text] * 8
    assert health.status_code == refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "shutting_down"


def signalled(running, *signals):
    """What uvicorn's signal handler does, for a server in a thread."""

    async def send(_http):
        for number in signals:
            loop = running.engine._loop
            loop.call_soon_threadsafe(running.server.handle_exit, number, None)

    return send


def test_a_second_signal_aborts():
    with serving(Engine.from_pretrained("demo", kv_cache_memory=2**24)) as running:
        twice = signalled(running, signal.SIGTERM, signal.SIGINT)
        streams, _ = asyncio.run(load(running, 8, then=twice))
        running.wait_until_empty()
    assert running.server.has_aborted
    assert all("being shut down" in stream and "[DONE]" in stream for stream in streams)


def test_the_timeout_aborts(caplog):
    loaded = Engine.from_pretrained("demo", kv_cache_memory=2**24)
    with serving(loaded, drain_timeout_s=0.05) as running:
        streams, _ = asyncio.run(load(running, 8, then=signalled(running, signal.SIGTERM)))
        running.wait_until_empty()
    assert running.server.has_aborted
    assert all("being shut down" in stream for stream in streams)
    assert "aborting" in caplog.text


def test_an_idle_server_exits_at_once_and_logs_json():
    with Process() as process:
        process.signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert {"time", "level", "logger", "message"} <= process.lines[0].keys()
