"""Two replicas of the server under real Ray Serve: the application of the door's page."""

import contextlib
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray.serve", reason="needs the extra 'ray'")

from multiexit_engine import Contrast, SamplingParams
from tests.compat.pages import Page
from tests.serve.local_ray import free_port, local_ray

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CONTRAST = {"decoding": {"mode": "contrast", "upper": 8, "lower": 4}}
SHARED = "The old house stood at the end of the road, where nobody had lived for many years. " * 3


@pytest.fixture(scope="module")
def page():
    """What the page's program printed, and where its application listens."""
    import ray  # noqa: F401
    from ray import serve

    port = free_port()
    program = Page("ray.md").programs[0].replace(":8000", f":{port}")
    printed = io.StringIO()
    with local_ray():
        try:
            serve.start(http_options={"port": port})
            with contextlib.redirect_stdout(printed):
                exec(compile(program, "page", "exec"), {"__name__": "page"})
            yield printed.getvalue(), f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


@pytest.fixture(scope="module")
def http(page):
    with httpx.Client(base_url=page[1], timeout=120) as http:
        yield http


@pytest.fixture(scope="module")
def client(page):
    with OpenAI(base_url=page[1] + "/v1", api_key="none", max_retries=0) as openai:
        yield openai


def complete(http, prompt, **fields):
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0} | fields
    return http.post("/v1/completions", json=body)


def alone(engine, prompt, length, mode=None):
    (output,) = engine.generate([prompt], SamplingParams(max_new_tokens=length), mode)
    return output.outputs[0].text


def replica_of(http, prompt):
    return complete(http, prompt, max_tokens=1).headers["x-replica-id"]


def prompts_of_both(http):
    """Three prompts that go to one replica, and three that go to the other."""
    groups: dict[str, list[str]] = {}
    for number in range(64):
        prompt = f"Chapter {number}. The sea"
        groups.setdefault(replica_of(http, prompt), []).append(prompt)
        if len(groups) == 2 and all(len(group) >= 3 for group in groups.values()):
            return {name: group[:3] for name, group in groups.items()}
    raise AssertionError(f"64 prompts went to {groups}")


def test_the_pages_program_prints_the_engines_text(page, engine):
    assert page[0].startswith(alone(engine, "The old house", 16, Contrast(8, 4)))


def test_streams_of_both_replicas_are_the_engines(http, client, engine):
    prompts = [prompt for group in prompts_of_both(http).values() for prompt in group]

    def stream(prompt):
        chunks = client.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=24,
            temperature=0,
            stream=True,
            extra_body=CONTRAST,
        )
        return [chunk.choices[0].text for chunk in chunks]

    with ThreadPoolExecutor(6) as pool:
        streams = list(pool.map(stream, prompts))
    assert ["".join(chunks) for chunks in streams] == [
        alone(engine, prompt, 24, Contrast(8, 4)) for prompt in prompts
    ]
    assert all(len(chunks) > 4 for chunks in streams)


def test_a_shared_prefix_leads_to_one_replica_and_its_blocks(http):
    answers = [complete(http, SHARED + end) for end in ("He", "She opened", "It was", "A dog")]
    assert len({answer.headers["x-replica-id"] for answer in answers}) == 1
    cached = [answer.json()["usage"]["prompt_tokens_details"] for answer in answers]
    assert all(details["cached_tokens"] >= 32 for details in cached[1:])


def test_an_error_keeps_its_status_and_form(http):
    answer = complete(http, "The", decoding={"mode": "exit", "layer": 99})
    assert answer.status_code == 400 and "99" in answer.json()["error"]["message"]


def test_a_body_that_is_too_long_is_refused(http):
    assert complete(http, "a" * 5_000_000).status_code == 413


def test_metrics_of_all_replicas_are_given_each_with_its_name(http):
    groups = prompts_of_both(http)
    before = {name: metrics_of(http, name)["vllm:generation_tokens_total"] for name in groups}
    for number, prompts in enumerate(groups.values(), 1):
        complete(http, prompts[0], max_tokens=10 * number, ignore_eos=True)
    after = {name: metrics_of(http, name)["vllm:generation_tokens_total"] for name in groups}
    assert [after[name] - before[name] for name in groups] == [10, 20]


def test_pages_without_a_prompt_are_answered(http):
    assert http.get("/v1/models").json()["data"][0]["id"] == "demo"


def metrics_of(http, name):
    """Sums of one replica's metrics."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.labels["replica"] == name:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    assert sums, f"no metrics of {name}"
    return sums


def test_a_client_that_leaves_its_stream_takes_the_request_with_it(http):
    name = replica_of(http, "The sea")
    before = metrics_of(http, name)["vllm:generation_tokens_total"]
    body = {"prompt": "The sea", "max_tokens": 400, "n": 32, "temperature": 1.0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as answer:
        lines = answer.iter_lines()  # held: httpx hangs up when it is collected
        next(lines)
        assert metrics_of(http, name)["vllm:num_requests_running"] > 0
    end = time.monotonic() + 10
    while (now := metrics_of(http, name))["vllm:num_requests_running"] and time.monotonic() < end:
        time.sleep(0.05)
    assert now["vllm:num_requests_running"] == 0
    assert now["vllm:generation_tokens_total"] - before < 32 * 400 / 2


def test_a_killed_replica_loses_no_request_that_had_no_byte_yet_and_none_of_the_others(
    http, page, engine
):
    import ray

    groups = prompts_of_both(http)
    killed, spared = groups
    actor = ray.get_actor(f"SERVE_REPLICA::default#ModelReplica#{killed}", namespace="serve")
    length = 300
    streamed: dict[str, str] = {}
    first_bytes = threading.Semaphore(0)

    def whole(prompt):
        answer = complete(http, prompt, max_tokens=length, ignore_eos=True)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"], answer.headers["x-replica-id"]

    def stream(prompt):
        with OpenAI(base_url=page[1] + "/v1", api_key="none", max_retries=0) as openai:
            chunks = openai.completions.create(
                model="demo",
                prompt=prompt,
                max_tokens=length,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in chunks:
                if prompt not in streamed:
                    first_bytes.release()
                streamed[prompt] = streamed.get(prompt, "") + chunk.choices[0].text

    sampling = SamplingParams(max_new_tokens=length, ignore_eos=True)
    prompts = groups[killed] + groups[spared]
    wanted = dict(
        zip(
            prompts,
            [output.outputs[0].text for output in engine.generate(prompts, sampling)],
            strict=True,
        )
    )
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(stream, prompt) for prompt in groups[spared]]
        answers = [pool.submit(whole, prompt) for prompt in groups[killed]]
        for _ in streams:
            assert first_bytes.acquire(timeout=60)
        while metrics_of(http, killed)["vllm:num_requests_running"] < len(answers):
            assert not any(answer.done() for answer in answers)
        assert not any(answer.done() for answer in answers), "too short to be killed meanwhile"
        ray.kill(actor)
        for running in streams:
            running.result(timeout=120)
        found = [answer.result(timeout=120) for answer in answers]
    assert streamed == {prompt: wanted[prompt] for prompt in groups[spared]}
    assert [text for text, _ in found] == [wanted[prompt] for prompt in groups[killed]]
    assert killed not in {replica for _, replica in found}
