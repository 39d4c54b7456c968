"""Many clients at once, rude ones among them: nothing is lost, nothing stays behind."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from multiexit_engine import Engine, SamplingParams
from multiexit_engine.serve.errors import CLIENT_HAS_GONE
from tests.serve.running import serving

PROMPTS = [f"{who} {did}" for who in ("He", "She", "The man", "A dog") for did in ("saw", "ran")]


def texts_alone(engine, max_new_tokens):
    params = SamplingParams(max_new_tokens=max_new_tokens)
    return {p: engine.generate(p, params)[0].outputs[0].text for p in PROMPTS}


def body(prompt, max_tokens, **more):
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | more


async def ask(http, prompt, max_tokens, **more):
    response = await http.post("/v1/completions", json=body(prompt, max_tokens, **more))
    response.raise_for_status()
    return response.json()["choices"][0]["text"]


def client(server, num_connections=200):
    limits = httpx.Limits(max_connections=num_connections)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


async def leave_early(http, prompt):
    """Read one event of a long stream and hang up."""
    request = body(prompt, 400, stream=True, ignore_eos=True)
    async with http.stream("POST", "/v1/completions", json=request) as response:
        await anext(response.aiter_lines())


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd_of_short_requests_all_get_their_text(server, engine, count):
    wanted = texts_alone(engine, 6)

    async def run():
        async with client(server, count) as http:
            prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
            return prompts, await asyncio.gather(*[ask(http, prompt, 6) for prompt in prompts])

    prompts, texts = asyncio.run(run())
    assert texts == [wanted[prompt] for prompt in prompts]


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_clients_that_hang_up_harm_nobody_and_leave_nothing(server, engine, count):
    wanted = texts_alone(engine, 20)

    async def run():
        async with client(server, 400) as http:
            rude = [leave_early(http, PROMPTS[i % len(PROMPTS)]) for i in range(count)]
            good = [ask(http, prompt, 20) for prompt in PROMPTS]
            texts = await asyncio.gather(*good, *rude)
            return texts[: len(PROMPTS)]

    assert asyncio.run(run()) == [wanted[prompt] for prompt in PROMPTS]
    server.wait_until_empty()


def test_hanging_up_frees_blocks_long_before_the_text_would_end(server):
    async def run():
        async with client(server) as http:
            await asyncio.gather(*[leave_early(http, "The") for _ in range(20)])

    before = server.engine.stats().num_generated_tokens
    asyncio.run(run())
    server.wait_until_empty(2.0)
    assert server.engine.stats().num_generated_tokens - before < 20 * 400 / 2


def test_hanging_up_on_a_stream_is_one_line_of_the_log_and_no_error(server, caplog):
    async def run():
        async with client(server) as http:
            await leave_early(http, PROMPTS[0])

    with caplog.at_level("INFO", "multiexit_engine.serve.access"):
        asyncio.run(run())
        server.wait_until_empty()
        end = time.monotonic() + 5
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.01)
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.fields["status"] == CLIENT_HAS_GONE


def test_hanging_up_on_a_whole_answer_aborts_it(server):
    async def run():
        async with client(server) as http:
            call = asyncio.create_task(ask(http, "The", 450, ignore_eos=True))
            while not server.engine.num_requests:
                await asyncio.sleep(0.001)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    before = server.engine.stats().num_generated_tokens
    asyncio.run(run())
    server.wait_until_empty(2.0)
    assert server.engine.stats().num_generated_tokens - before < 450


def test_a_slow_reader_holds_up_nobody(server):
    """It reads nothing at all; its events pile up in the sockets, and then in the server."""
    request = json.dumps(
        body("The", 500, stream=True, ignore_eos=True, n=32, temperature=1.0, logprobs=20, seed=1)
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request)}\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((host, int(port)))
    slow.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + request)
    while not server.engine.num_requests:
        time.sleep(0.01)

    async def run():
        async with client(server) as http:
            return await asyncio.wait_for(asyncio.gather(*[ask(http, p, 6) for p in PROMPTS]), 30)

    assert len(asyncio.run(run())) == len(PROMPTS)
    slow.close()
    server.wait_until_empty()


def test_a_full_server_answers_429_and_loses_nobody(engine):
    wanted = texts_alone(engine, 6)
    loaded = Engine.from_pretrained("demo", dtype="float32", device="cpu", kv_cache_memory=2**24)

    async def patiently(http, prompt):
        refusals = 0
        while True:
            response = await http.post("/v1/completions", json=body(prompt, 6))
            if response.status_code != 429:
                return response.json()["choices"][0]["text"], refusals
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "too_many_requests"
            refusals += 1
            await asyncio.sleep(0.02)

    async def run(running):
        async with client(running) as http:
            return await asyncio.gather(*[patiently(http, PROMPTS[i % 8]) for i in range(48)])

    with serving(loaded, max_requests=4) as running:
        answers = asyncio.run(run(running))
        running.wait_until_empty()
    assert [text for text, _ in answers] == [wanted[PROMPTS[i % 8]] for i in range(48)]
    assert sum(refusals for _, refusals in answers) > 0


def test_a_request_that_needs_more_blocks_than_exist_is_refused_before_work():
    bytes_per_token = 8 * 2 * 192 * 4
    loaded = Engine.from_pretrained(
        "demo", dtype="float32", device="cpu", kv_cache_memory=bytes_per_token * 128
    )
    with serving(loaded) as running:
        response = httpx.post(running.url + "/v1/completions", json=body("The", 300))
        assert response.status_code == 400
        assert "need 19 KV blocks of 16: the cache has 8" in response.json()["error"]["message"]
        assert running.engine.stats().num_steps == 0
        good = httpx.post(running.url + "/v1/completions", json=body("The", 100, ignore_eos=True))
        assert good.json()["usage"]["completion_tokens"] == 100
        running.wait_until_empty()


def test_a_poisoned_request_fails_alone(engine, monkeypatch):
    wanted = texts_alone(engine, 20)
    loaded = Engine.from_pretrained("demo", dtype="float32", device="cpu", kv_cache_memory=2**25)
    runner = loaded._core.runner
    run_batch = runner.run

    def poison(batch):
        """What a mode that gives NaN makes of its request."""
        output = run_batch(batch)
        for item in batch.scheduled:
            if item.sequence.request.prompt_token_ids[0] == 4095:
                output.failures[item.sequence.request.request_id] = "its mode gave NaN"
        return output

    monkeypatch.setattr(runner, "run", poison)

    async def run(running):
        async with client(running) as http:
            good = [ask(http, prompt, 20) for prompt in PROMPTS]
            bad = [
                http.post("/v1/completions", json=body([4095, 5], 20, stream=stream))
                for stream in (False, True)
            ]
            *texts, whole, stream = await asyncio.gather(*good, *bad)
            return texts, whole, stream

    with serving(loaded) as running:
        texts, whole, stream = asyncio.run(run(running))
        running.wait_until_empty()
    assert texts == [wanted[prompt] for prompt in PROMPTS]
    assert whole.status_code == 500
    assert whole.json()["error"] == {
        "message": "its mode gave NaN",
        "type": "server_error",
        "param": None,
        "code": "request_failed",
    }
    assert '"code":"request_failed"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
