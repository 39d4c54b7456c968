"""Spans of blocks in one call, held against the modules, for every family of models."""

import pytest
import torch

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.errors import BackendUnavailable
from multiexit_engine.models import build_model
from multiexit_engine.ops import decoder_blocks, use_backend
from tests.models.harness import CASES, CPU, Cache, forward_batch, save, transformers_model
from tests.ops.backends import all_backends, implementation_or_skip

TEXTS = [[5, 17, 99, 3, 3, 42, 0, 61, 8, 7, 1], [9, 8, 7], [1, 2, 3, 4, 5, 6, 7]]
STEPS = [[(0, 4), (0, 1), (0, 7)], [(4, 5), (1, 2)], [(5, 11), (2, 3)]]
# tests/cuda has the one that runs few rows
EVERY_ROW = all_backends(decoder_blocks, is_long=True, but=("cuda",))
FAMILIES = pytest.mark.parametrize(
    "name",
    ["gpt2 with every switch", "gpt_neo in another pattern", "llama 3", "mistral",
     "llama with biases, wide heads, tied", "qwen2 with windows", "qwen3 with biases"],
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: save(transformers_model(*case), folder / name.replace(" ", "_"))
        for name, case in CASES.items()
    }


def hidden_after(model, function, texts=TEXTS, steps=STEPS, blocks=slice(None)):
    """The outputs of each step, over a cache that is NaN where nothing was written."""
    cache = Cache.for_texts(model, texts, block_size=4)
    outputs = []
    with torch.inference_mode():
        for spans in steps:
            some = Cache(cache.kv_cache, cache.sequences[: len(spans)])
            batch = forward_batch(some, spans)
            hidden = model.embed(batch.token_ids, batch.positions)
            order = list(model.blocks)[blocks]
            outputs.append(function(hidden, order, cache.kv_cache, batch))
    return outputs, cache.kv_cache


@EVERY_ROW
@FAMILIES
def test_backend_equals_the_modules_in_float32(checkpoints, backend, name):
    function = implementation_or_skip(decoder_blocks, backend)
    model = build_model(open_checkpoint(checkpoints[name]), CPU, torch.float32)
    with use_backend("reference"):
        expected, written = hidden_after(model, decoder_blocks.reference)
    actual, own = hidden_after(model, function)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()), rtol=0)
    for layer in range(model.config.num_layers):
        for find in ("key", "value"):
            one, other = getattr(own, find)(layer), getattr(written, find)(layer)
            assert torch.equal(one.isnan(), other.isnan())
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4, equal_nan=True)


@EVERY_ROW
@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backend_is_as_near_to_float32_as_the_modules(checkpoints, backend, name, dtype):
    function = implementation_or_skip(decoder_blocks, backend)
    checkpoint = open_checkpoint(checkpoints[name])
    model = build_model(checkpoint, CPU, dtype)
    # the same rounded weights, computed in float32
    exact = build_model(checkpoint, CPU, torch.float32)
    for own, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        own.data = rounded.data.float()
    with use_backend("reference"):
        truth, _ = hidden_after(exact, decoder_blocks.reference)
        reference, _ = hidden_after(model, decoder_blocks.reference)
    actual, _ = hidden_after(model, function)
    for one, other, true in zip(actual, reference, truth, strict=True):
        assert one.dtype in (dtype, torch.float32)
        own_error = (one.float() - true).abs().mean()
        assert own_error <= 1.2 * (other.float() - true).abs().mean() + 1e-6


@EVERY_ROW
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_row_is_the_same_in_any_batch(checkpoints, backend, name):
    function = implementation_or_skip(decoder_blocks, backend)
    model = build_model(open_checkpoint(checkpoints[name]), CPU, torch.float32)
    together, _ = hidden_after(model, function)
    alone, _ = hidden_after(model, function, [TEXTS[0]], [[(0, 4)], [(4, 5)], [(5, 11)]])
    one_by_one, _ = hidden_after(model, function, [TEXTS[0]], [[(i, i + 1)] for i in range(11)])
    rows = torch.cat([together[0][:4], together[1][:1], together[2][:6]])
    assert torch.equal(torch.cat(alone), rows)
    assert torch.equal(torch.cat(one_by_one), rows)


@all_backends(decoder_blocks, but=("cuda",))
def test_spans_of_layers_are_told_apart(checkpoints, backend):
    function = implementation_or_skip(decoder_blocks, backend)
    model = build_model(open_checkpoint(checkpoints["gpt2"]), CPU, torch.float32)
    whole, _ = hidden_after(model, function, blocks=slice(1, 3))

    def one_after_the_other(hidden, blocks, kv_cache, batch):
        for block in blocks:
            hidden = function(hidden, [block], kv_cache, batch)
        return hidden

    apart, _ = hidden_after(model, one_after_the_other, blocks=slice(1, 3))
    assert all(torch.equal(one, other) for one, other in zip(whole, apart, strict=True))


def test_native_demands_what_was_compiled(monkeypatch, checkpoints):
    model = build_model(open_checkpoint(checkpoints["gpt2"]), CPU, torch.float32)
    monkeypatch.setattr("multiexit_engine.ops.registry._load", lambda _: ImportError("not built"))
    with use_backend("native"), pytest.raises(BackendUnavailable, match="not built"):
        hidden_after(model, decoder_blocks)
    with use_backend(None):
        outputs, _ = hidden_after(model, decoder_blocks)
    assert not outputs[0].isnan().any()
