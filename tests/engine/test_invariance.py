"""A request's result depends on itself alone: not on its batch mates, nor on how it is computed.

Every mode of every family of models. With the C++ kernels no bit changes; plain PyTorch rounds
otherwise, which may not change a token or an exit.
"""

import random
from functools import cached_property
from importlib.util import find_spec
from itertools import chain

import pytest
import torch

from multiexit_engine.decoding.depth_policy import DepthPolicy
from multiexit_engine.layers import rough_heads
from tests.engine.company import run_in_random_company
from tests.engine.families import FAMILIES, SOURCED, little_memory, requests_of

HAS_KERNELS = find_spec("multiexit_engine._C") is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the C++ extension is not built")
# answers in one pass have no cache, and nothing to abort between tokens
writing_token_by_token = pytest.mark.parametrize("alone", list(FAMILIES)[:-1], indirect=True)


def choices(output):
    """What a request chose: tokens, where each was chosen, and what it was contrasted with."""
    return [(c.token_ids, c.exit_layers, c.premature_layers) for c in output.outputs]


def numbers(output):
    """Confidences and log-probabilities."""
    tables = chain.from_iterable(c.logprobs or [] for c in output.outputs)
    log_probs = [found.logprob for table in tables for found in table.values()]
    return [value for c in output.outputs for value in c.confidences] + log_probs


def together(engine, requests):
    return engine.generate(*map(list, zip(*requests, strict=True)))


def one_by_one(engine, requests):
    return [engine.generate([p], s, m)[0] for p, s, m in requests]


def assert_same(found, expected, *, to_the_bit=HAS_KERNELS):
    assert [choices(output) for output in found] == [choices(output) for output in expected]
    for one, other in zip(found, expected, strict=True):
        wanted = numbers(other)
        near = pytest.approx(wanted, rel=1e-5, abs=1e-4, nan_ok=True)
        assert numbers(one) == (wanted if to_the_bit else near)


class Alone:
    """A family's model, and what each of its requests gives on its own, in one thread."""

    def __init__(self, name, folder):
        self.family = FAMILIES[name]
        self.folder = self.family.save(folder)
        self.requests = requests_of(self.family)

    def open(self, **options):
        return self.family.open(self.folder, **options)

    @property
    def little_memory(self):
        return little_memory(self.open(), self.requests)

    @cached_property
    def outputs(self):
        return one_by_one(self.open(prefix_caching=False), self.requests)


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request, tmp_path_factory):
    return Alone(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def held_at_random(monkeypatch):
    """Whether rows wait at an exit is drawn."""
    draw = random.Random(5)
    holds = lambda self, place: place.num_coming > 0 and draw.random() < 0.6  # noqa: E731
    monkeypatch.setattr(DepthPolicy, "holds", holds)


@pytest.fixture
def coded(monkeypatch):
    """Heads of any size have codes, on any CPU."""
    monkeypatch.setattr(rough_heads, "are_codes_fast", lambda: True)
    monkeypatch.setattr(rough_heads, "LEAST_NUMBERS", 0)


WAYS = [
    {},
    {"max_num_batched_tokens": 37},
    {"block_size": 7, "max_batch_size": 3},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_batches_chunks_and_blocks_change_nothing(alone, options):
    engine = alone.open(**options)
    assert_same(together(engine, alone.requests), alone.outputs)
    assert not engine.has_unfinished()


def test_the_number_of_threads_changes_nothing(alone, two_threads):
    engine = alone.open(prefix_caching=False)
    assert_same(together(engine, alone.requests[::3]), alone.outputs[::3])
    assert_same(one_by_one(engine, alone.requests[::12]), alone.outputs[::12])


def test_plain_pytorch_chooses_the_same(alone):
    engine = alone.open(backend="reference", block_size=5, max_num_batched_tokens=64)
    assert_same(together(engine, alone.requests), alone.outputs, to_the_bit=False)


def test_codes_of_heads_change_nothing(alone, coded):
    engine = alone.open()
    # ELMER takes log-probabilities from the exact test that lets a row go, or reads them later
    to_the_bit = HAS_KERNELS and alone.family is not FAMILIES["elmer"]
    assert_same(together(engine, alone.requests), alone.outputs, to_the_bit=to_the_bit)
    some = one_by_one(engine, alone.requests[::12])
    assert_same(some, alone.outputs[::12], to_the_bit=to_the_bit)


def test_rows_that_wait_for_others_change_nothing(alone, held_at_random):
    assert_same(together(alone.open(), alone.requests), alone.outputs)


@writing_token_by_token
def test_preemption_changes_nothing(alone):
    small = alone.open(kv_cache_memory=alone.little_memory, block_size=4)
    assert_same(together(small, alone.requests), alone.outputs)
    stats = small.stats()
    assert stats.num_preemptions
    assert stats.num_free_kv_blocks == stats.num_kv_blocks
    small._scheduler.check_integrity()


@writing_token_by_token
@pytest.mark.parametrize("seed", range(2))
def test_random_company_and_aborts_change_nothing(alone, held_at_random, seed):
    draw = random.Random(seed)
    engine = alone.open(kv_cache_memory=alone.little_memory, block_size=8, max_batch_size=8)
    found, aborted = run_in_random_company(engine, alone.requests, draw)
    expected = [[c.token_ids for c in output.outputs] for output in alone.outputs]
    assert found == {i: own for i, own in enumerate(expected) if i not in aborted}
    assert aborted
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks


WEIGHTS = [
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"quantization": "int8"},
    {"quantization": "int4", "dtype": "bfloat16"},
]


@needs_kernels
@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_weights_of_fewer_bits_change_no_bit_in_company(alone, options):
    requests = alone.requests[::3]
    crowded = alone.open(max_num_batched_tokens=40, max_batch_size=7, **options)
    assert_same(together(crowded, requests), one_by_one(alone.open(**options), requests))


@needs_kernels
@pytest.mark.parametrize("alone", SOURCED, indirect=True)
def test_plain_pytorch_chooses_the_same_by_quantized_weights(alone):
    native, reference = (
        together(alone.open(quantization="int8", backend=backend), alone.requests[::3])
        for backend in ("native", "reference")
    )
    assert [choices(output) for output in native] == [choices(output) for output in reference]
