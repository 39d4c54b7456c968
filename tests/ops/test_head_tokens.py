import pytest
import torch

from multiexit_engine.ops import head_logits, head_tokens, sample_tokens
from tests.kernels.hidden_states import assert_chosen, exact_head, two_exits
from tests.ops.backends import (
    all_backends,
    device_for,
    implementation_or_skip,
    skip_unless_supported,
)


def test_reference_takes_the_argmax_and_its_probability():
    case = two_exits(5, 63, 16)
    assert_chosen(head_tokens.reference(*case.head_args()), exact_head(case), case)


def test_reference_samples_as_the_sampler_does():
    case = two_exits(6, 63, 16, temperature=0.7)
    logits = head_logits(case.upper_hidden, case.upper_weight)
    expected = sample_tokens(logits.log_softmax(-1) / 0.7, case.seeds, case.positions)
    assert torch.equal(head_tokens.reference(*case.head_args())[0], expected)


def test_bias_is_added_before_anything_else():
    case = two_exits(2, 30, 8)
    bias = torch.zeros(30)
    bias[17] = 1e3
    tokens, logprobs = head_tokens.reference(*case.head_args(bias))
    assert tokens.tolist() == [17, 17]
    torch.testing.assert_close(logprobs, torch.zeros(2))


@all_backends(head_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_backend_chooses_as_the_formula_does(backend, temperature):
    function = implementation_or_skip(head_tokens, backend)
    case = two_exits(3, 100, 24, temperature=temperature)
    device = device_for(head_tokens, backend)
    args = case.to(device).head_args()
    skip_unless_supported(head_tokens, backend, args)
    assert_chosen(function(*args), exact_head(case), case)
