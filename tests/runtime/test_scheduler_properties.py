"""Whatever arrives, is aborted or runs out: every token is computed on the blocks it needs."""

import contextlib
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.runtime.scheduler_harness import FakeEngine, make_config, make_request

# few different tokens and common beginnings, so that prefixes are often shared
PROMPTS = st.builds(
    lambda beginning, rest: [*beginning, *rest],
    st.sampled_from([(), (0, 0, 0, 0), (0, 1, 0, 1, 0, 1, 0, 1), (1,) * 12]),
    st.lists(st.integers(0, 1), min_size=1, max_size=6),
)
KINDS = st.sampled_from(["plain", "plain", "n", "beams", "score", "prompt_logprobs"])


def request_of(name, prompt, kind, width, max_new_tokens, depth):
    more = {
        "plain": {},
        "n": {"n": width, "temperature": 1.0},
        "beams": {"num_beams": max(width, 2)},
        "score": {},
        "prompt_logprobs": {"prompt_logprobs": 0},
    }[kind]
    score_from = max(1, len(prompt) // 2) if kind == "score" else None
    return make_request(name, prompt, depth, score_from, max_new_tokens=max_new_tokens, **more)


NUM_STORMS = 300
LIMITS = {
    "num_kv_blocks": st.integers(6, 16),
    "block_size": st.integers(1, 4),
    "max_batch_size": st.integers(1, 8),
    "max_num_batched_tokens": st.one_of(st.integers(1, 4), st.integers(5, 24)),
    "prefix_caching": st.booleans(),
}
REQUESTS = {
    "prompt": PROMPTS,
    "kind": KINDS,
    "width": st.integers(1, 4),
    "max_new_tokens": st.integers(1, 12),
    "depth": st.integers(1, 3),
}


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 1000), stop_chance=st.sampled_from([0.0, 0.2]), **LIMITS)
    def start(self, seed, stop_chance, **limits):
        self.engine = FakeEngine(make_config(max_model_len=24, **limits), seed, stop_chance)
        self.num_added = 0

    @rule(**REQUESTS)
    def add(self, **choices):
        request = request_of(f"request-{self.num_added}", **choices)
        try:
            self.engine.scheduler.check_fits(request)
        except ValueError:
            with pytest.raises(ValueError, match="must not exceed|KV blocks"):
                self.engine.add(request)
        else:
            self.engine.add(request)
            self.num_added += 1

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            batch = self.engine.step()
            assert (batch is not None) or not self.engine.scheduler.has_unfinished

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.requests))))

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort_while_a_step_runs(self, data):
        self.engine.step(data.draw(st.sampled_from(sorted(self.engine.requests))))

    @invariant()
    def is_consistent(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()
            assert self.engine.scheduler.has_unfinished == bool(self.engine.requests)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.run_to_the_end()
        scheduler = self.engine.scheduler
        assert scheduler.num_free_blocks == scheduler.num_blocks
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def storm(seed: int) -> FakeEngine:
    """A run of many mixed requests on few blocks, all of them waiting from the start."""
    draw = random.Random(seed)
    config = make_config(
        max_model_len=32,
        num_kv_blocks=draw.randint(16, 48),
        block_size=draw.randint(1, 3),
        max_batch_size=draw.randint(3, 8),
        max_num_batched_tokens=draw.choice([2, 3, 4, 8, 16, 64]),
        prefix_caching=draw.random() < 0.6,
    )
    engine = FakeEngine(config, seed, draw.choice([0.0, 0.1]))
    for number in range(draw.randint(6, 20)):
        prompt = [0] * draw.randint(0, 5) + [draw.randint(0, 1) for _ in range(draw.randint(1, 4))]
        kind = draw.choice(["plain", "plain", "n", "beams", "beams", "score", "prompt_logprobs"])
        request = request_of(
            f"{number}", prompt, kind, draw.randint(1, 4), draw.randint(1, 24), draw.randint(1, 3)
        )
        with contextlib.suppress(ValueError):
            engine.add(request)
    engine.run_to_the_end()
    return engine


def test_everything_finishes_when_blocks_are_scarce():
    schedulers = [storm(seed).scheduler for seed in range(NUM_STORMS)]
    assert all(s.num_free_blocks == s.num_blocks for s in schedulers)
    # the storms are worth their name
    assert sum(s.num_preemptions for s in schedulers) > NUM_STORMS
    assert sum(s.prefix_hit_tokens for s in schedulers) > NUM_STORMS
