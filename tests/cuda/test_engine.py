"""An engine whose heads, or layers, are CUDA C++: the tokens of the CPU's kernels, in all modes."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import (
    contrast_tokens,
    decoder_blocks,
    head_tokens,
    operands,
    registry,
    use_backend,
)
from multiexit_engine.runtime.device import persistent
from tests.models.harness import CASES, CPU, save, transformers_model
from tests.ops.test_decoder_blocks import hidden_after
from tests.tiny import save_gpt2

TEXT = [[5, 17, 99, 3, 42, 0, 61]]
PROMPTS = [[1, 2, 3], [200, 100, 50, 25, 12], [9] * 20]
MODES = [Original(), Exit(2), Contrast(4, 2), Contrast("original", 2, alpha=0.01)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), num_layers=4, num_heads=2, exits=(2, 4))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="bfloat16")


@contextmanager
def heads_on(ring):
    """Hands both ops to the ring inside the block; gives the number of rows of each call."""
    calls, load = [], registry._load

    def loaded(backend):
        if backend.name != "cuda":
            return load(backend)
        function = getattr(ring.heads, backend.target.split(":")[1])

        def counted(hidden, *args, **options):
            calls.append(hidden.shape[0])
            return function(hidden, *args, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operands, "_capability", lambda _: (9, 0))
        patch.setattr(registry, "_load", loaded)
        for op in (head_tokens, contrast_tokens):
            patch.setattr(op, "backends", {"cuda": replace(op.backends["cuda"], device="cpu")})
        yield calls


@contextmanager
def layers_on(ring, engine):
    """Hands spans of few rows to the persistent kernel; gives the rows and layers of each call."""
    calls, load = [], registry._load
    backends, kernel = decoder_blocks.backends, ring.blocks

    def loaded(backend):
        if backend.name != "cuda":
            return load(backend)

        def counted(hidden, blocks, *args):
            calls.append((hidden.shape[0], len(blocks)))
            return kernel.decoder_blocks(hidden, blocks, *args)

        return counted

    blocks = list(engine._model.blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_load", loaded)
        on_cpu = {"cuda": replace(backends["cuda"], device="cpu"), "cpu": backends["cpu"]}
        patch.setattr(decoder_blocks, "backends", on_cpu)
        patch.setattr(persistent, "persistent_kernel", lambda: kernel)
        persistent.run_in_one_launch(engine._model, engine.config.block_size)
        try:
            yield calls
        finally:
            for block in blocks:
                del block.most_persistent_rows


def ids(engine, prompts, mode, **sampling):
    asked = SamplingParams(max_new_tokens=6, ignore_eos=True, **sampling)
    return [output.outputs[0].token_ids for output in engine.generate(prompts, asked, mode)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_k": 0}], ids=str)
def test_the_tokens_are_those_of_the_other_kernels(engine, mode, sampling, ring):
    expected = ids(engine, PROMPTS, mode, **sampling)
    with heads_on(ring) as calls:
        assert ids(engine, PROMPTS, mode, **sampling) == expected
        assert [ids(engine, [p], mode, **sampling)[0] for p in PROMPTS] == expected
    assert set(calls) == {1, 3}


@pytest.mark.parametrize(
    ("mode", "layers"), [(Original(), {4}), (Contrast(4, 2), {2})], ids=["original", "contrast"]
)
def test_the_tokens_are_those_of_other_layers(folder, mode, layers, ring):
    # random weights tell tokens apart by little: float16 rounds less than bfloat16
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float16")
    expected = ids(engine, PROMPTS, mode)
    with layers_on(ring, engine) as calls:
        assert ids(engine, PROMPTS, mode) == expected
        assert [ids(engine, [p], mode)[0] for p in PROMPTS] == expected
    assert {rows for rows, _ in calls} == {1, 3}
    assert {count for _, count in calls} == layers


@pytest.mark.parametrize("name", ["gpt_neo in another pattern", "llama 3", "qwen2 with windows"])
def test_layers_of_other_families_equal_the_modules(name, ring, tmp_path):
    checkpoint = open_checkpoint(save(transformers_model(*CASES[name]), tmp_path))
    rounded = build_model(checkpoint, CPU, torch.float16)
    exact = build_model(checkpoint, CPU, torch.float32)
    for own, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        own.data = other.data.float()
    one_by_one = [[(place, place + 1)] for place in range(7)]
    with use_backend("reference"):
        expected, _ = hidden_after(exact, decoder_blocks.reference, TEXT, one_by_one)
    found, _ = hidden_after(rounded, ring.blocks.decoder_blocks, TEXT, one_by_one)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=4e-3 * float(other.abs().max()), rtol=0)
