"""T5 on the GPU's kernels, interpreted where there is no GPU: IBM's goldens, blocks, attention."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from multiexit_engine import Engine
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import assume_device, use_backend
from tests.golden.test_t5_golden import (
    CASES,
    FOLDER,
    expected_of,
    mode_named,
    sampling_of,
    single_calls,
    source_of,
    with_start,
)
from tests.models.harness import ENCODER_DECODERS, save
from tests.models.test_encoder_decoders import (
    SOURCES,
    encode,
    run_in_chunks,
    transformers_model,
)
from tests.ops.paged import biased_attention_truth, paged_batch

attention = pytest.importorskip("multiexit_engine.kernels.attention")

# decode, drafts to verify, prefill chunks, all at once; over the border of two parts
BATCHES = [([1, 2, 1], [1, 300, 530]), ([20, 1, 17], [60, 280, 17])]


def rehearsal(device):
    """The kernels of the GPU for tensors that are not on one."""
    return nullcontext() if device == "cuda" else assume_device("cuda")


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
@pytest.mark.parametrize("reach", [1, 40])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_biased_attention_equals_the_formula(lengths, reach, dtype, tolerance, device):
    batch = paged_batch(
        *lengths, num_heads=3, num_kv_heads=3, head_dim=20, dtype=dtype, device=device
    )
    bias = torch.randn(3, reach, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = attention.biased_paged_attention(
        batch.query, batch.key_cache, batch.value_cache, batch.layout, 0.3, bias.to(device)
    )
    truth = biased_attention_truth(batch, 0.3, bias)
    assert ((found.cpu().double() - truth).norm() / truth.norm()).item() < tolerance


def test_a_biased_sequence_does_not_know_its_batch_mates(device):
    batch = paged_batch([1, 9, 1], [700, 9, 40], num_heads=2, num_kv_heads=2, device=device)
    bias = torch.randn(2, 30, generator=torch.Generator().manual_seed(1)).to(device)
    caches, attend = (batch.key_cache, batch.value_cache), attention.biased_paged_attention
    together = attend(batch.query, *caches, batch.layout, 0.3, bias)
    alone = attend(batch.query[:1], *caches, batch.layout.first(1), 0.3, bias)
    assert torch.equal(together[:1], alone)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are the CPU's")
@pytest.mark.parametrize(
    "name", [pytest.param("t5", marks=pytest.mark.slow), "t5 gated and untied"]
)
def test_both_stacks_equal_the_modules(name, tmp_path):
    folder = save(transformers_model(*ENCODER_DECODERS[name]), tmp_path)
    model = build_model(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    with use_backend("reference"):
        wanted = [encode(model, SOURCES[:2]), *run_in_chunks(model, 4, [1])]
    with assume_device("cuda"):
        found = [encode(model, SOURCES[:2]), *run_in_chunks(model, 4, [1])]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("case", "length", "every"),
    [("t5_layer", 3, 4), *(pytest.param(case, 24, 1, marks=pytest.mark.slow) for case in CASES)],
)
def test_greedy_ids_of_its_modes_are_ibms(case, length, every, device):
    engine = Engine.from_pretrained(
        FOLDER / CASES[case]["checkpoint"],
        device=device,
        dtype="float32",
        backend="native",
        vocab_projection_mode=CASES[case]["vocab_projection_mode"],
        lm_head_layer_indices=CASES[case]["lm_head_layer_indices_passed"],
    )
    greedy = {call["config"]: call for call in single_calls(case) if call["kind"] == "greedy"}
    calls = dict(list(greedy.items())[::every])
    with rehearsal(device):
        outputs = engine.generate(
            [source_of(case, call) for call in calls.values()],
            [replace(sampling_of(call), max_new_tokens=length) for call in calls.values()],
            [mode_named(case, config) for config in calls],
        )
    for call, output in zip(calls.values(), outputs, strict=True):
        wanted = expected_of(case)[call["tensor"]].tolist()
        assert with_start(output) == wanted[: length + 1]
