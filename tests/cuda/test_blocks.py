"""The persistent kernel on fibers against float64, amid NaN, in many orders."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from multiexit_engine.kernels.launch import kept_scratch
from tests.cuda import building
from tests.cuda.random_layers import Layers, Shape, amid_nan, copied, layers

GPT2, LLAMA = Shape(), Shape().llama()
# odd heads and keys, a window, a warp without parts, several parts of rows, of keys, of sequences
CASES = {
    "one row": (GPT2, [5]),
    "first tokens": (GPT2, [1, 1]),
    "four lengths and a window": (replace(GPT2, windows=(3, None, 300)), [5, 1, 30, 301]),
    "heads of 24": (Shape(width=40, heads=5, kv_heads=5, head_dim=24, inner=8, kind="gelu"), [9]),
    "parts of rows": (replace(GPT2, width=1032, inner=2056, windows=(None,), kind="relu"), [2]),
    "no bias, quick_gelu": (replace(GPT2, has_bias=False, kind="quick_gelu"), [2, 3, 4]),
    "groups of heads": (LLAMA, [6, 11, 2]),
    "one key head": (replace(LLAMA, kv_heads=1, has_bias=True, head_dim=40, inner=104), [17, 7]),
    "tokens as blocks": (replace(LLAMA, block_size=1), [3]),
}
EVERY = pytest.mark.parametrize("name", CASES)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
LONG = replace(GPT2, heads=1, kv_heads=1, windows=(None,))


def case_of(name: str, **changes) -> Layers:
    shape, contexts = CASES[name]
    return layers(replace(shape, **changes), contexts)


# GPT-2-medium's layers
MEDIUM = Shape(1024, 16, 16, 64, 4096, windows=(None,) * 3, scale=0.125, block_size=16)
GPU_CASES = {**CASES, "medium": (MEDIUM, [300, 1, 700, 129]), "medium alone": (MEDIUM, [700])}


def run(ring, case: Layers, cache=None, blocks=None) -> torch.Tensor:
    cache = case.kv_cache if cache is None else cache
    blocks = case.blocks if blocks is None else blocks
    return ring.blocks.decoder_blocks(case.hidden, blocks, cache, case.batch)


def written(case: Layers, find: str) -> torch.Tensor:
    slots = case.batch.slot_mapping
    parts = [getattr(case.kv_cache, find)(layer) for layer in range(len(case.blocks))]
    return torch.stack([part.flatten(0, 1)[slots] for part in parts])


def assert_near(found, truth, dtype):
    assert not found.isnan().any()
    error = (found.double() - truth).norm() / truth.norm()
    assert error <= TOLERANCES[dtype]


@EVERY
@DTYPES
def test_layers_equal_the_formula(ring, name, dtype):
    case = case_of(name, dtype=dtype)
    found = run(ring, case)
    assert found.dtype == torch.float32
    assert_near(found, case.truth.hidden, dtype)
    assert_near(written(case, "key"), case.truth.keys, dtype)
    assert_near(written(case, "value"), case.truth.values, dtype)


@pytest.mark.parametrize("context", [256, 257, 4097, 5000])
def test_long_sequences_are_cut_and_joined(ring, context):
    case = layers(LONG, [context])
    assert_near(run(ring, case), case.truth.hidden, torch.float16)


def test_scores_of_any_size_give_a_softmax(ring):
    case = layers(replace(GPT2, scale=2000.0, windows=(None,)), [300])
    assert_near(run(ring, case), case.truth.hidden, torch.float16)


@EVERY
def test_only_the_rows_own_slots_are_written(ring, name):
    case = case_of(name)
    before = case.kv_cache._blocks.clone()
    run(ring, case)
    after = case.kv_cache._blocks
    for old, new in zip(before.flatten(2, 3).flatten(0, 1), after.flatten(2, 3).flatten(0, 1),
                        strict=True):  # fmt: skip
        new[case.batch.slot_mapping] = old[case.batch.slot_mapping]
    assert torch.equal(before.view(torch.int16), after.view(torch.int16))


@EVERY
def test_every_weight_is_read_once(ring, name):
    case = case_of(name)
    run(ring, case)
    matrices = [
        part.weight
        for block in case.blocks
        for part in (*vars(block.attention).values(), *vars(block.mlp).values())
        if isinstance(part, SimpleNamespace) and hasattr(part, "weight")
    ]
    assert len(matrices) == 4 * len(case.blocks)
    assert ring.copied_bytes() == sum(matrix.nbytes for matrix in matrices)


@pytest.mark.parametrize("columns", [8, 1000])
def test_what_is_read_behind_is_asked_for_once(ring, columns):
    case, then = case_of("one row"), amid_nan(torch.randn(33, columns).half())
    expected = run(ring, case)
    found = ring.blocks.decoder_blocks(case.hidden, case.blocks, case.kv_cache, case.batch, then)
    assert torch.equal(found, expected)
    assert ring.asked_bytes() == then.nbytes


@pytest.mark.parametrize("name", ["four lengths and a window", "groups of heads"])
def test_a_row_is_the_same_in_any_company(ring, name):
    case = case_of(name)
    alone = [case.of([row]) for row in range(len(case.contexts))]
    pair = case.of([2, 0])
    together = run(ring, case)
    for row, own in enumerate(alone):
        assert torch.equal(run(ring, own)[0], together[row])
    assert torch.equal(run(ring, pair), together[[2, 0]])


@pytest.mark.parametrize("seed", range(1, 5))
def test_no_order_of_threads_and_no_number_of_blocks_changes_a_bit(ring, seed):
    case = case_of("four lengths and a window")
    caches = [copied(case.kv_cache) for _ in range(2)]
    one = run(ring, case, caches[0])
    own = ring.shaped(seed=seed, multiprocessors=1 + 2 * seed)
    assert torch.equal(run(own, case, caches[1]), one)
    assert torch.equal(caches[0]._blocks.view(torch.int16), caches[1]._blocks.view(torch.int16))


@pytest.mark.parametrize("shared_kib", [120, 90])
def test_smaller_rings_take_smaller_pieces_and_change_no_bit(ring, shared_kib):
    case = case_of("parts of rows")
    cache = copied(case.kv_cache)
    one = run(ring, case, cache)
    assert torch.equal(run(ring.shaped(shared_kib=shared_kib), case), one)


def test_spans_one_after_the_other_have_the_same_bits(ring):
    case = case_of("four lengths and a window")
    cache = copied(case.kv_cache)
    whole = run(ring, case, cache)
    first = run(ring, case, blocks=case.blocks[:1])
    rest = replace(case, hidden=first)
    assert torch.equal(run(ring, rest, blocks=case.blocks[1:]), whole)


def test_a_launch_leaves_what_the_next_one_needs(ring):
    case = case_of("groups of heads")
    found = [run(ring, case) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_hosts_lengths_may_be_bounds(ring):
    case = case_of("four lengths and a window")
    cache = copied(case.kv_cache)
    layout = replace(case.batch.layout, context_lens=(512,) * 4, has_bounds=True)
    bounded = replace(case, kv_cache=cache, batch=replace(case.batch, layout=layout))
    assert torch.equal(run(ring, bounded), run(ring, case))


def test_padding_writes_where_nobody_owns_and_harms_no_row(ring):
    case = layers(GPT2, [5, 1])
    alone = case.of([0])
    case.hidden[1] = torch.nan
    found = run(ring, case)
    assert found[1].isnan().all()
    assert torch.equal(found[0], run(ring, alone)[0])


def test_rows_in_half_precision_are_widened(ring):
    case = case_of("one row")
    half = replace(case, hidden=case.hidden.half())
    wide = replace(case, hidden=amid_nan(half.hidden.float()))
    assert torch.equal(run(ring, half), run(ring, wide))


def test_a_barrier_that_is_passed_too_early_gives_other_numbers(ring):
    case = case_of("one row")
    first = run(ring, case, copied(case.kv_cache))
    kept = kept_scratch("decoder layers", [0.0], 2, torch.device("cpu"))
    kept.view(torch.int32)[0, 0] = 10**6
    found = run(ring.shaped(seed=1), case)
    assert not torch.equal(found, first)
    assert not kept.any()


def test_blocks_that_are_not_together_are_a_deadlock(ring):
    case = case_of("one row")
    apart = ring.library.constant("multiexit_host_apart")
    apart.value = 1
    try:
        with pytest.raises(ValueError, match="deadlock"):
            run(ring, case)
    finally:
        apart.value = 0
        # who is stopped in the middle leaves its counts
        kept_scratch("decoder layers", [0.0], 2, torch.device("cpu")).zero_()


@pytest.mark.slow
@pytest.mark.skipif(building.GXX is None, reason="no g++")
def test_a_bounded_barrier_stops_the_kernel(tmp_path):
    bounded = building.on_fibers(90, tmp_path, "-DMULTIEXIT_BOUNDED_SPIN=0")
    bounded.library.constant("multiexit_host_apart").value = 1
    with pytest.raises(ValueError, match="a kernel stopped itself"):
        run(bounded, case_of("one row"))
    kept_scratch("decoder layers", [0.0], 2, torch.device("cpu")).zero_()


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layers_on_a_gpu_equal_the_formula(built, name, dtype):
    shape, contexts = GPU_CASES[name]
    case = layers(replace(shape, dtype=dtype), contexts).to("cuda")
    assert_near(run(built, case).cpu(), case.truth.hidden, dtype)
    assert_near(written(case, "key").cpu(), case.truth.keys, dtype)
    assert_near(written(case, "value").cpu(), case.truth.values, dtype)


@pytest.mark.gpu
def test_a_captured_launch_on_a_gpu_reads_the_new_states(built):
    case = layers(*GPU_CASES["medium"]).to("cuda")
    other = torch.randn_like(case.hidden)
    first = run(built, case)
    expected = [first, run(built, replace(case, hidden=other))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(built, case)
    found = []
    for states in (case.hidden.clone(), other):
        case.hidden.copy_(states)
        graph.replay()
        found.append(captured.clone())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_many_launches_on_a_gpu_agree(built):
    case = layers(*GPU_CASES["medium alone"]).to("cuda")
    first = run(built, case)
    assert all(torch.equal(run(built, case), first) for _ in range(200))
