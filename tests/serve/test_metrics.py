"""What /metrics tells."""

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from multiexit_engine import Engine
from tests.serve.running import serving

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture(scope="module")
def watched():
    """A server of its own, so that its counts are ours."""
    loaded = Engine.from_pretrained("demo", dtype="float32", device="cpu", kv_cache_memory=2**24)
    with serving(loaded) as running:
        yield running


def samples(running):
    text = httpx.get(running.url + "/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            found[sample.name, *sorted(labels.items())] = sample.value
    return found


def growth(running, **body):
    before = samples(running)
    httpx.post(running.url + "/v1/completions", json=body, timeout=60).raise_for_status()
    running.wait_until_empty()
    after = samples(running)
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def test_tokens_and_times_are_counted(watched):
    grown = growth(
        watched, prompt=[[5, 6, 7], [8, 9]], max_tokens=10, temperature=0, ignore_eos=True
    )
    assert grown["vllm:prompt_tokens_total",] == 5
    assert grown["vllm:generation_tokens_total",] == 20
    assert grown["vllm:request_success_total", ("finished_reason", "length")] == 2
    assert grown["vllm:time_to_first_token_seconds_count",] == 2
    assert grown["vllm:inter_token_latency_seconds_count",] == 18
    assert grown["vllm:e2e_request_latency_seconds_count",] == 2
    assert grown["vllm:request_queue_time_seconds_count",] == 2
    assert grown["vllm:request_generation_tokens_sum",] == 20
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time")
    total = sum(grown[f"vllm:{part}_seconds_sum",] for part in parts)
    assert total == pytest.approx(grown["vllm:e2e_request_latency_seconds_sum",], abs=1e-3)


def test_exit_layers_are_a_histogram(watched):
    exit_4 = {"mode": "exit", "layer": 4}
    grown = growth(watched, prompt="a", max_tokens=7, ignore_eos=True, decoding=exit_4)
    assert grown["multiexit:exit_layer_bucket", ("le", "2.0")] == 0
    assert grown["multiexit:exit_layer_bucket", ("le", "4.0")] == 7
    assert grown["multiexit:exit_layer_count",] == 7


CONTRAST = {"mode": "contrast", "upper": 8, "lower": 4}


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}, {"seed": 1, "temperature": 1.0}], ids=str)
def test_plausible_tokens_of_contrasts_are_a_histogram(watched, more):
    body = {"prompt": "The old", "temperature": 0, "max_tokens": 9, "ignore_eos": True} | more
    alone = growth(watched, decoding=CONTRAST | {"alpha": 1.0}, **body)
    every = growth(watched, decoding=CONTRAST | {"alpha": 0.0}, **body)
    name = "multiexit:contrast_candidates"
    assert alone[f"{name}_count",] == alone[f"{name}_sum",] == 9
    assert alone[f"{name}_bucket", ("le", "1.0")] == 9
    assert every[f"{name}_count",] == 9 and every[f"{name}_sum",] == 9 * 4096
    assert every[f"{name}_bucket", ("le", "1000.0")] == 0
    assert every[f"{name}_bucket", ("le", "10000.0")] == 9


def test_a_request_without_contrast_adds_no_candidates(watched):
    body = {"prompt": "The old", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    assert growth(watched, **body)["multiexit:contrast_candidates_count",] == 0


def test_drafts_and_those_that_were_right_are_counted(watched):
    mode = {"mode": "self_speculative", "draft_exit": 4, "draft_len": 3}
    body = {"prompt": "The old", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    grown = growth(watched, decoding=mode, **body)
    drafted = grown["vllm:spec_decode_num_draft_tokens_total",]
    assert 0 < grown["vllm:spec_decode_num_accepted_tokens_total",] <= drafted


def test_prefix_hits_are_counted(watched):
    prompt = "Once upon a time in a far country " * 8
    growth(watched, prompt=prompt, max_tokens=1)
    grown = growth(watched, prompt=prompt, max_tokens=1)
    assert 0 < grown["vllm:prefix_cache_hits_total",] < grown["vllm:prefix_cache_queries_total",]


def test_an_idle_server_holds_nothing(watched):
    now = samples(watched)
    assert now["vllm:num_requests_running",] == now["vllm:num_requests_waiting",] == 0
    assert now["vllm:kv_cache_usage_perc",] == 0


def test_a_client_that_leaves_counts_as_aborted(watched):
    before = samples(watched)
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", watched.url + "/v1/completions", json=body) as response:
        next(response.iter_lines())
    watched.wait_until_empty()
    aborted = "vllm:request_success_total", ("finished_reason", "abort")
    assert samples(watched)[aborted] == before.get(aborted, 0) + 1
    assert not watched.engine.observer._timelines


def test_every_metric_of_the_dashboard_exists(watched):
    text = httpx.get(watched.url + "/metrics").text
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    names = {name for query in queries for name in re.findall(r"(?:vllm|multiexit):\w+", query)}
    assert len(names) > 10
    assert not {name for name in names if name not in text}
