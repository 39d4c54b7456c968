"""What only a GPU can show: real sizes, races, graphs."""

import pytest
import torch

from tests.kernels.hidden_states import TwoExits, two_exits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
heads = pytest.importorskip("multiexit_engine.kernels.heads")

ROWS = pytest.mark.parametrize("rows", [1, 16, 32, 64, 100])


def gpt2_medium(rows: int, **options) -> TwoExits:
    return two_exits(rows, 50257, 1024, torch.bfloat16, **options).to("cuda")


def contrast_truth(case: TwoExits) -> torch.Tensor:
    """[rows, vocab] float64, on the GPU."""
    from multiexit_engine.ops.contrast import contrast_logits

    upper = case.upper_hidden.double() @ case.upper_weight.double().T
    lower = case.lower_hidden.double() @ case.lower_weight.double().T
    return contrast_logits.reference(upper, lower, case.alpha.double())


@ROWS
@pytest.mark.parametrize("spread", [0.2, 4.0])
def test_contrast_of_a_whole_vocabulary(rows, spread):
    case = gpt2_medium(rows, spread=spread)
    tokens, logprobs = heads.contrast_tokens(*case.args())
    truth = contrast_truth(case)
    chosen = truth.gather(1, tokens[:, None])[:, 0]
    assert (truth.amax(-1) - chosen).max() < 1e-4
    assert (logprobs - chosen).abs().max() < 1e-4


@ROWS
def test_head_of_a_whole_vocabulary(rows):
    case = gpt2_medium(rows)
    tokens, logprobs = heads.head_tokens(*case.head_args())
    truth = (case.upper_hidden.double() @ case.upper_weight.double().T).log_softmax(-1)
    assert (truth.amax(-1) - truth.gather(1, tokens[:, None])[:, 0]).max() < 1e-4
    assert (logprobs - truth.amax(-1)).abs().max() < 1e-4


@ROWS
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_run_gives_the_same_bits(rows, temperature):
    case = gpt2_medium(rows, spread=1.0, temperature=temperature)
    first = heads.contrast_tokens(*case.args())
    for _ in range(20):
        again = heads.contrast_tokens(*case.args())
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_replayed_graphs_see_new_hidden_states():
    case, other = (gpt2_medium(4, seed=seed) for seed in (1, 2))
    expected = [heads.contrast_tokens(*case.args())[0].tolist()]
    truth = heads.contrast_tokens(
        other.upper_hidden, case.upper_weight, other.lower_hidden, case.lower_weight,
        case.alpha, case.temperature, case.seeds, case.positions,
    )  # fmt: skip
    expected.append(truth[0].tolist())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = heads.contrast_tokens(*case.args())
    graph.replay()
    seen = [tokens.tolist()]
    case.upper_hidden.copy_(other.upper_hidden)
    case.lower_hidden.copy_(other.lower_hidden)
    graph.replay()
    seen.append(tokens.tolist())
    assert seen == expected
