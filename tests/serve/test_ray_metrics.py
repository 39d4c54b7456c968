"""Metrics of several replicas on one page; without a cluster."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from multiexit_engine.serve.ray_metrics import merge_metrics


def page(count):
    registry = CollectorRegistry()
    Counter("vllm:tokens", "Tokens.", ["model_name"], registry=registry).labels("m").inc(count)
    Histogram("vllm:gap", "Gaps.", buckets=(1, 2), registry=registry).observe(count)
    return generate_latest(registry).decode()


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_sample_keeps_its_value_and_gains_its_replica():
    merged = samples(merge_metrics({"a": page(1), "b": page(2)}).decode())
    expected = {
        (name, *sorted([*labels, ("replica", replica)])): value
        for replica, count in (("a", 1), ("b", 2))
        for (name, *labels), value in samples(page(count)).items()
    }
    assert {k: v for k, v in merged.items() if "_created" not in k[0]} == {
        k: v for k, v in expected.items() if "_created" not in k[0]
    }


def test_a_metric_is_described_once():
    text = merge_metrics({"a": page(1), "b": page(2)}).decode()
    assert text.count("# TYPE vllm:tokens_total counter") == 1
    assert text.count("# TYPE vllm:gap histogram") == 1


def test_no_replica_gives_an_empty_page():
    assert merge_metrics({}) == b""
