from dataclasses import replace

import pytest
import torch

from multiexit_engine.ops import biased_paged_attention
from tests.ops.backends import (
    all_backends,
    assert_as_good_as_reference,
    device_for,
    implementation_or_skip,
)
from tests.ops.paged import attention_truth, biased_attention_truth, paged_batch

SCALE, REACH = 0.7, 6
BATCHES = pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([1], [1]), ([1, 5, 3, 1], [9, 5, 11, 1]), ([1, 1, 1], [63, 1, 300]), ([3, 63], [100, 63])],
)


def batch(query_lens=(1, 5, 3, 1), context_lens=(9, 5, 11, 1), **shape):
    return paged_batch(list(query_lens), list(context_lens), num_heads=3, num_kv_heads=3, **shape)


def biases(reach):
    return torch.randn(3, reach, generator=torch.Generator().manual_seed(1))


def run(own, bias):
    return biased_paged_attention.reference(
        own.query, own.key_cache, own.value_cache, own.layout, SCALE, bias
    )


def test_each_distance_adds_its_bias_and_far_ones_the_last():
    own, bias = batch(), biases(REACH)
    truth = biased_attention_truth(own, SCALE, bias)
    torch.testing.assert_close(run(own, bias).double(), truth, atol=2e-6, rtol=0)


def test_no_bias_is_paged_attention():
    own = batch()
    found = run(own, torch.zeros(3, REACH)).double()
    torch.testing.assert_close(found, attention_truth(own, SCALE, None), atol=2e-6, rtol=0)


@pytest.mark.parametrize("bound", [40, 300])
def test_lengths_may_come_from_the_device_within_bounds(bound):
    own, bias = batch([1, 1, 1], [9, 33, 1]), biases(17)
    bounded = replace(own.layout, context_lens=(bound,) * 3, has_bounds=True)
    truth = biased_attention_truth(own, SCALE, bias)
    found = run(replace(own, layout=bounded), bias).double()
    torch.testing.assert_close(found, truth, atol=2e-6, rtol=0)


@all_backends(biased_paged_attention)
@BATCHES
@pytest.mark.parametrize("reach", [1, 17, 400])
def test_backend_is_as_good_as_the_reference(backend, query_lens, context_lens, reach):
    function = implementation_or_skip(biased_paged_attention, backend)
    device = device_for(biased_paged_attention, backend)
    own = batch(query_lens, context_lens, head_dim=16, device=device)
    bias = biases(reach).to(device)
    args = (own.query, own.key_cache, own.value_cache, own.layout, SCALE, bias)
    assert_as_good_as_reference(biased_paged_attention, function(*args), args, 3e-6)
