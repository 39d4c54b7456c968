import pytest
import torch

from tests.kernels.hidden_states import assert_chosen, exact_contrast, exact_head, two_exits

heads = pytest.importorskip("multiexit_engine.kernels.heads")

# rows, vocabulary, width: odd sizes, every kind of tile, more rows than one launch takes
SHAPES = [(1, 1031, 100), (7, 63, 7), (17, 130, 32), (40, 100, 48), (66, 70, 16)]
CASES = pytest.mark.parametrize("shape", SHAPES, ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 0.8])


def contrast(case, device):
    return heads.contrast_tokens(*case.to(device).args())


@CASES
@DTYPES
@TEMPERATURES
def test_head_tokens_equal_the_formula(shape, dtype, temperature, device):
    case = two_exits(*shape, dtype, temperature=temperature)
    result = heads.head_tokens(*case.to(device).head_args())
    assert_chosen(result, exact_head(case), case)


def test_bias_counts(device):
    case = two_exits(2, 100, 16)
    bias = torch.linspace(-9, 9, 100)
    result = heads.head_tokens(*case.to(device).head_args(bias.to(device)))
    assert_chosen(result, exact_head(case, bias), case)


@CASES
@DTYPES
@TEMPERATURES
def test_contrast_tokens_equal_the_formula(shape, dtype, temperature, device):
    case = two_exits(*shape, dtype, temperature=temperature)
    assert_chosen(contrast(case, device), exact_contrast(case), case)


@TEMPERATURES
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1e-4, 0.5, 1.0, 2.0])
def test_every_threshold(alpha, temperature, device):
    case = two_exits(3, 300, 32, alpha=alpha, temperature=temperature)
    assert_chosen(contrast(case, device), exact_contrast(case), case)


@TEMPERATURES
@pytest.mark.parametrize("rows", [1, 7])
def test_flat_distributions_in_which_every_token_is_plausible(rows, temperature, device):
    case = two_exits(rows, 600, 16, spread=0.1, temperature=temperature)
    assert_chosen(contrast(case, device), exact_contrast(case), case)


def test_one_head_for_both_exits(device):
    case = two_exits(3, 300, 32, torch.bfloat16, shared=True)
    assert_chosen(contrast(case, device), exact_contrast(case), case)


def test_rows_of_one_batch_have_modes_of_their_own(device):
    case = two_exits(5, 300, 32)
    case.temperature[:] = torch.tensor([0.0, 1.0, 0.0, 0.3, 2.0])
    case.alpha[:] = torch.tensor([0.1, 0.0, 1.0, 0.5, 1e-3])
    assert_chosen(contrast(case, device), exact_contrast(case), case)


def test_of_equal_tokens_the_lowest_is_taken(device):
    case = two_exits(2, 200, 16)
    for tensor in (case.upper_weight, case.lower_weight, case.upper_hidden, case.lower_hidden):
        # sums of small integers are exact in any order
        tensor.round_()
    case.upper_weight[100:] = case.upper_weight[:100]
    case.lower_weight[100:] = case.lower_weight[:100]
    assert (heads.head_tokens(*case.to(device).head_args())[0] < 100).all()
    assert (contrast(case, device)[0] < 100).all()


def test_second_call_finds_the_scratch_as_the_first_did(device):
    first, second = (two_exits(4, 300, 32, spread=s, seed=s) for s in (9, 1))
    contrast(first, device)
    assert_chosen(contrast(second, device), exact_contrast(second), second)


def test_a_row_of_nan_harms_no_other(device):
    case = two_exits(3, 300, 32)
    case.upper_hidden[1] = float("nan")
    tokens, logprobs = contrast(case, device)
    assert ((tokens >= 0) & (tokens < 300)).all()
    assert logprobs[1].isnan()
    truth = exact_contrast(case)
    for row in (0, 2):
        assert tokens[row].item() == truth[row].argmax().item()


@pytest.mark.slow
def test_many_samples_follow_the_contrasted_distribution(device):
    draws = 64
    case = two_exits(draws, 12, 16, spread=0.8, temperature=1.0)
    for tensor in (case.upper_hidden, case.lower_hidden):
        tensor[:] = tensor[:1].clone()
    counts = torch.zeros(12)
    for start in range(4):
        case.positions[:] = torch.arange(draws) + draws * start
        counts += torch.bincount(contrast(case, device)[0].cpu(), minlength=12)
    expected = exact_contrast(case)[0].exp() * 4 * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 31.3, "0.1 % quantile of 11 degrees of freedom"


@CASES
@TEMPERATURES
def test_the_plausible_tokens_are_counted(shape, temperature, device):
    case = two_exits(*shape, temperature=temperature)
    counts = torch.full((shape[0],), -1, dtype=torch.int32, device=device)
    heads.contrast_tokens(*case.to(device).args(), counts)
    p = exact_head(case).exp()
    assert counts.tolist() == (p >= 0.1 * p.amax(-1, keepdim=True)).sum(-1).tolist()


@TEMPERATURES
def test_a_row_has_the_same_bits_beside_any_others(temperature, device):
    case = two_exits(40, 300, 100, temperature=temperature).to(device)
    together = heads.contrast_tokens(*case.args())
    for rows in (slice(3, 4), slice(17, 39)):
        own = [part if part.shape[0] == 300 else part[rows].contiguous() for part in case.args()]
        for one, all_of_them in zip(heads.contrast_tokens(*own), together, strict=True):
            assert torch.equal(one, all_of_them[rows])
