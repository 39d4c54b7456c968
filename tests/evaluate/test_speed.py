"""The measuring core counts tokens and milliseconds that fit together."""

import pytest

from multiexit_engine import Engine, Exit
from multiexit_engine.evaluate.speed import measure_latency, measure_throughput
from tests.golden.acd_checkpoints import CHECKPOINTS


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(CHECKPOINTS / "gpt2_layer", device="cpu", dtype="float32")


def test_latency_counts_each_token_once(engine):
    found = measure_latency(engine, Exit(2), prompt_len=5, max_new_tokens=4, num_runs=1)
    assert found.first_token_ms > 0
    assert found.tokens_per_second == pytest.approx(1000 / found.token_ms)


def test_throughput_counts_the_tokens_of_all_requests(engine):
    found = measure_throughput(engine, batch_size=3, prompt_len=5, max_new_tokens=4, num_runs=1)
    assert found.tokens_per_second * found.seconds == pytest.approx(3 * 4)


def test_a_latency_needs_two_tokens(engine):
    with pytest.raises(ValueError, match="max_new_tokens=1"):
        measure_latency(engine, max_new_tokens=1)
