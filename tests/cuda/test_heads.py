"""The head kernels on fibers against float64, amid NaN, in many orders."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from tests.cuda.amid_nan import amid_nan
from tests.kernels.hidden_states import (
    TwoExits,
    assert_chosen,
    exact_contrast,
    exact_head,
    two_exits,
)

# rows, vocabulary, width: one group, none for some warps, a lane without numbers, several pieces
SHAPES = [(1, 1, 8), (1, 1031, 104), (2, 130, 768), (3, 63, 8), (4, 100, 1032), (1, 70, 2056)]
CASES = pytest.mark.parametrize("shape", SHAPES, ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 0.8])


def exits(rows: int, vocab: int, width: int, dtype=torch.bfloat16, **options) -> TwoExits:
    case = two_exits(rows, vocab, width, dtype, **options)
    floats = [f.name for f in fields(case) if getattr(case, f.name).is_floating_point()]
    return replace(case, **{name: amid_nan(getattr(case, name)) for name in floats})


def contrast(ring, case):
    return ring.heads.contrast_tokens(*case.args())


def head(ring, case, bias=None):
    return ring.heads.head_tokens(*case.head_args(bias))


@CASES
@DTYPES
@TEMPERATURES
def test_head_tokens_equal_the_formula(ring, shape, dtype, temperature):
    case = exits(*shape, dtype, temperature=temperature)
    assert_chosen(head(ring, case), exact_head(case), case)


@CASES
@DTYPES
@TEMPERATURES
def test_contrast_tokens_equal_the_formula(ring, shape, dtype, temperature):
    case = exits(*shape, dtype, temperature=temperature)
    assert_chosen(contrast(ring, case), exact_contrast(case), case)


@TEMPERATURES
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1e-4, 0.5, 1.0, 2.0])
def test_every_threshold(ring, alpha, temperature):
    case = exits(3, 300, 32, alpha=alpha, temperature=temperature)
    assert_chosen(contrast(ring, case), exact_contrast(case), case)


@TEMPERATURES
@pytest.mark.parametrize("rows", [1, 4])
def test_flat_distributions_in_which_every_token_is_plausible(ring, rows, temperature):
    case = exits(rows, 600, 16, spread=0.1, temperature=temperature)
    assert_chosen(contrast(ring, case), exact_contrast(case), case)


def test_the_plausible_tokens_are_counted(ring):
    case, counts = exits(3, 300, 32, spread=1.0), torch.full((6,), -1, dtype=torch.int32)
    ring.heads.contrast_tokens(*case.args(), counts[::2])
    p = exact_head(case).exp()
    expected = (p >= 0.1 * p.amax(-1, keepdim=True)).sum(-1).tolist()
    assert counts.tolist() == [expected[0], -1, expected[1], -1, expected[2], -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bias_counts(ring, dtype):
    case, bias = exits(2, 100, 16, dtype), torch.linspace(-9, 9, 100).to(dtype)
    bias[:40] = -torch.inf
    assert_chosen(head(ring, case, amid_nan(bias)), exact_head(case, bias), case)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_fell_behind_take_part_in_the_draw(ring, seed):
    case = exits(4, 900, 16, temperature=3.0, alpha=0.9, seed=seed)
    case.upper_hidden[:] = case.upper_hidden[:1].clone()
    # every token is the best so far, and in the end most of them are implausible
    rising = (case.upper_weight @ case.upper_hidden[0]).argsort()
    case.upper_weight[:] = case.upper_weight[rising]
    found = contrast(ring.shaped(seed=seed), case)
    assert_chosen(found, exact_contrast(case), case)


def test_the_noise_is_that_of_the_reference_for_any_seed_and_position(ring):
    case = exits(4, 300, 16, temperature=2.0)
    case.seeds[:] = torch.tensor([2**40 + 7, -(2**50), 2**63 - 1, -1])
    case.positions[:] = torch.tensor([0, 2**31 - 1, 70_000, 1])
    assert_chosen(head(ring, case), exact_head(case), case)
    assert_chosen(contrast(ring, case), exact_contrast(case), case)


def test_one_head_for_both_exits(ring):
    case = exits(3, 300, 32, shared=True)
    assert_chosen(contrast(ring, case), exact_contrast(case), case)


def test_rows_of_one_batch_have_modes_of_their_own(ring):
    case = exits(4, 300, 32)
    case.temperature[:] = torch.tensor([0.0, 1.0, 0.3, 2.0])
    case.alpha[:] = torch.tensor([0.1, 0.0, 1.0, 1e-3])
    assert_chosen(contrast(ring, case), exact_contrast(case), case)


def test_of_equal_tokens_the_lowest_is_taken(ring):
    case = exits(2, 200, 16)
    for tensor in (case.upper_weight, case.lower_weight, case.upper_hidden, case.lower_hidden):
        # sums of small integers are exact in any order
        tensor.round_()
    case.upper_weight[100:] = case.upper_weight[:100]
    case.lower_weight[100:] = case.lower_weight[:100]
    assert (head(ring, case)[0] < 100).all()
    assert (contrast(ring, case)[0] < 100).all()


@TEMPERATURES
def test_a_row_of_nan_harms_no_other(ring, temperature):
    case = exits(3, 300, 32, temperature=temperature)
    case.upper_hidden[1] = torch.nan
    tokens, log_probs = contrast(ring, case)
    assert ((tokens >= 0) & (tokens < 300)).all()
    assert log_probs.isnan().tolist() == [False, True, False]
    sound = replace(case, upper_hidden=case.upper_hidden.nan_to_num())
    assert_rows(contrast(ring, sound), (tokens, log_probs), [0, 2])


def assert_rows(one, other, rows):
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine[rows], theirs[rows])


@TEMPERATURES
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_every_order_of_blocks_and_threads_gives_the_same_bits(ring, spread, temperature):
    case = exits(2, 500, 32, spread=spread, temperature=temperature)
    expected = contrast(ring, case)
    for seed in range(1, 6):
        assert_rows(contrast(ring.shaped(seed=seed), case), expected, [0, 1])


@TEMPERATURES
def test_a_row_does_not_know_its_batch_mates(ring, temperature):
    case = exits(4, 300, 520, temperature=temperature)
    together = contrast(ring, case)
    for rows in ([0], [3], [1, 2], [0, 2, 3]):
        own = {
            f.name: getattr(case, f.name)[rows]
            for f in fields(case)
            if not f.name.endswith("weight")
        }
        some = contrast(ring, replace(case, **own))
        assert torch.equal(some[0], together[0][rows])
        assert torch.equal(some[1], together[1][rows])


@pytest.mark.parametrize("rows", [1, 4])
def test_the_upper_head_is_read_exactly_once(ring, rows):
    case = exits(rows, 131, 1032, spread=0.1)
    contrast(ring, case)
    assert ring.copied_bytes() == case.upper_weight.nbytes


def test_more_blocks_than_the_vocabulary_has_groups(ring):
    case = exits(2, 63, 16)
    many = ring.shaped(multiprocessors=40, seed=1)
    assert_chosen(contrast(many, case), exact_contrast(case), case)


def test_small_shared_memory_cuts_rows_into_more_pieces_and_changes_no_bit(ring):
    case = exits(4, 100, 1536, temperature=0.8)
    expected = contrast(ring, case)
    assert_rows(contrast(ring.shaped(shared_kib=99), case), expected, [0, 1, 2, 3])


def test_the_widest_rows_that_the_registry_hands_over_fit_the_smallest_gpu(ring):
    case = exits(4, 9, 4096)
    assert_chosen(contrast(ring.shaped(shared_kib=99), case), exact_contrast(case), case)


def test_the_scratch_is_left_as_found(ring):
    first, second = (exits(4, 300, 32, spread=s, seed=s) for s in (9, 1))
    contrast(ring, first)
    assert_chosen(contrast(ring, second), exact_contrast(second), second)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", [0.2, 4.0])
@TEMPERATURES
def test_whole_vocabularies_on_a_gpu(built, rows, spread, temperature):
    case = two_exits(rows, 50257, 1024, torch.bfloat16, spread=spread, temperature=temperature)
    gpu = case.to("cuda")
    assert_chosen(built.head_tokens(*gpu.head_args()), exact_head(case), case, 1e-4)
    found = built.contrast_tokens(*gpu.args())
    assert_chosen(found, exact_contrast(case), case, 1e-4)
    for _ in range(20):
        again = built.contrast_tokens(*gpu.args())
        assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.gpu
def test_replayed_graphs_see_new_hidden_states(built):
    case, other = (
        two_exits(1, 50257, 1024, torch.bfloat16, seed=seed).to("cuda") for seed in (1, 2)
    )
    expected = [case, replace(case, upper_hidden=other.upper_hidden.clone())]
    expected = [built.contrast_tokens(*each.args())[0].tolist() for each in expected]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = built.contrast_tokens(*case.args())
    graph.replay()
    seen = [tokens.tolist()]
    case.upper_hidden.copy_(other.upper_hidden)
    graph.replay()
    seen.append(tokens.tolist())
    assert seen == expected
