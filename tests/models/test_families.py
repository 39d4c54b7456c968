"""Every family against transformers, over scrambled blocks and NaN in all that nobody wrote."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from multiexit_engine.batch import CopiedRows
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.checkpoint.families import FAMILIES
from multiexit_engine.models import build_model
from multiexit_engine.models.registry import BUILDERS
from multiexit_engine.ops import use_backend
from tests.models.harness import (
    CASES,
    CPU,
    ENCODER_DECODERS,
    VOCAB,
    Cache,
    assert_equal_up_to_rounding,
    expected_logits,
    expected_taps,
    forward_batch,
    run_step,
    run_text,
    save,
    transformers_model,
)

TEXT = torch.randint(0, VOCAB, (31,), generator=torch.Generator().manual_seed(3)).tolist()
OTHER = TEXT[::-1][:9]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model and ours, of the same weights."""
    theirs = transformers_model(*CASES[request.param])
    folder = save(theirs, tmp_path_factory.mktemp("checkpoint"))
    return theirs, build_model(open_checkpoint(folder), CPU, torch.float32)


@pytest.mark.parametrize("chunk", [31, 7, 1])
def test_every_layer_equals_transformers(pair, chunk):
    theirs, ours = pair
    for actual, expected in zip(
        run_text(ours, TEXT, chunk), expected_taps(theirs, TEXT), strict=True
    ):
        assert_equal_up_to_rounding(actual, expected)


def test_original_head_equals_transformers(pair):
    theirs, ours = pair
    tap = run_text(ours, TEXT, len(TEXT))[-1]
    with torch.inference_mode():
        operands = ours.heads.operands(ours.heads.original, tap)
    logits = operands.hidden @ operands.weight.T
    assert_equal_up_to_rounding(logits, expected_logits(theirs, TEXT))


def test_prefill_and_decode_rows_share_a_batch(pair):
    _, ours = pair
    cache = Cache.for_texts(ours, [TEXT, OTHER, TEXT[:12]], block_size=3)
    run_step(ours, cache, [(0, 30), (0, 4), (0, 11)])
    mixed = run_step(ours, cache, [(30, 31), (4, 9), (11, 12)])[-1]
    assert_equal_up_to_rounding(mixed[0], run_text(ours, TEXT, 31)[-1][30:])
    assert_equal_up_to_rounding(mixed[1], run_text(ours, OTHER, 9)[-1][4:])
    assert_equal_up_to_rounding(mixed[2], run_text(ours, TEXT[:12], 12)[-1][11:])


def test_a_span_of_layers_equals_its_layers_one_by_one(pair):
    _, ours = pair
    cache = Cache.for_texts(ours, [TEXT], block_size=4)
    batch = forward_batch(cache, [(0, 31)])
    with torch.inference_mode():
        hidden = ours.embed(batch.token_ids, batch.positions)
        hidden = ours.run_layers(hidden, 0, ours.config.num_layers, cache.kv_cache, batch)
    assert torch.equal(hidden, run_text(ours, TEXT, 31)[-1])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_keys_and_values_of_copied_rows_are_those_that_layers_write(pair, backend):
    _, ours = pair
    ran, wrote = (Cache.for_texts(ours, [TEXT], block_size=4) for _ in range(2))
    batch, last = forward_batch(ran, [(0, 31)]), forward_batch(wrote, [(30, 31)])
    with torch.inference_mode(), nullcontext() if backend == "auto" else use_backend(backend):
        hidden = ours.embed(batch.token_ids, batch.positions)
        for layer in range(ours.config.num_layers):
            copied = CopiedRows(hidden[:-1], batch.positions[:-1], batch.slot_mapping[:-1])
            span = layer, layer + 1
            found = ours.run_layers(
                hidden[-1:], *span, wrote.kv_cache, replace(last, copied=copied)
            )
            hidden = ours.run_layers(hidden, *span, ran.kv_cache, batch)
            torch.testing.assert_close(found, hidden[-1:], atol=1e-4, rtol=1e-4)
    for layer in range(ours.config.num_layers):
        for kind in ("key", "value"):
            expected, found = (getattr(c.kv_cache, kind)(layer) for c in (ran, wrote))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_every_family_that_can_be_read_can_be_built():
    assert BUILDERS.keys() == FAMILIES.keys()
    tested = {**CASES, **ENCODER_DECODERS}
    # transformers has no ELMER; its tests stand in tests/golden and tests/engine
    assert {model_type for model_type, _ in tested.values()} == BUILDERS.keys() - {"elmer"}
