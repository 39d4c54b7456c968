import pytest
import torch

from multiexit_engine.ops import contrast_heads, contrast_tokens, head_tokens
from tests.kernels.hidden_states import assert_chosen, exact_contrast, exact_head, two_exits
from tests.ops.backends import (
    all_backends,
    device_for,
    implementation_or_skip,
    skip_unless_supported,
)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_reference_chooses_from_the_contrast_of_both_heads(temperature):
    case = two_exits(5, 63, 16, temperature=temperature)
    assert_chosen(contrast_tokens.reference(*case.args()), exact_contrast(case), case)


def test_greedy_tokens_are_the_argmax_of_contrasted_heads():
    case = two_exits(7, 63, 16)
    log_probs = contrast_heads(*case.args()[:5])
    assert torch.equal(contrast_tokens.reference(*case.args())[0], log_probs.argmax(-1))


def test_alpha_of_one_leaves_the_upper_head_alone():
    case = two_exits(7, 63, 16, alpha=1.0)
    tokens, _ = contrast_tokens.reference(*case.args())
    assert torch.equal(tokens, head_tokens.reference(*case.head_args())[0])


@all_backends(contrast_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_backend_chooses_as_the_formula_does(backend, temperature):
    function = implementation_or_skip(contrast_tokens, backend)
    case = two_exits(3, 100, 24, temperature=temperature)
    device = device_for(contrast_tokens, backend)
    args = case.to(device).args()
    skip_unless_supported(contrast_tokens, backend, args)
    assert_chosen(function(*args), exact_contrast(case), case)


@all_backends(contrast_tokens)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 0.0])
def test_the_plausible_tokens_are_counted(backend, temperature, alpha):
    function = implementation_or_skip(contrast_tokens, backend)
    case = two_exits(3, 100, 24, temperature=temperature, alpha=alpha)
    device = device_for(contrast_tokens, backend)
    own, actual = (torch.full((3,), -1, dtype=torch.int32, device=d) for d in ("cpu", device))
    args = case.to(device).args()
    skip_unless_supported(contrast_tokens, backend, args)
    contrast_tokens.reference(*case.args(), own)
    function(*args, actual)
    p = exact_head(case).exp()
    assert own.tolist() == (p >= alpha * p.amax(-1, keepdim=True)).sum(-1).tolist()
    assert actual.tolist() == own.tolist()
