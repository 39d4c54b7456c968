"""Programs of a launch race for thresholds; what comes out must not tell who won."""

import pytest
import torch

from tests.kernels.hidden_states import two_exits

heads = pytest.importorskip("multiexit_engine.kernels.heads")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the order of a GPU is its own")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_contrast_is_bitwise_the_same_in_any_order(spread, temperature):
    from tests.kernels.interpreter import program_order

    case = two_exits(2, 500, 32, spread=spread, temperature=temperature)
    results = []
    for seed in (None, 1, 2):
        with program_order(seed):
            results.append(heads.contrast_tokens(*case.args()))
    for tokens, logprobs in results[1:]:
        assert torch.equal(tokens, results[0][0])
        assert torch.equal(logprobs, results[0][1])
