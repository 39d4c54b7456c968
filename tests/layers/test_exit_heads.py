"""Every projection mode against its formula in the class docstring of the mode."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.config import VocabularyProjectionMode as Mode
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.models import build_model
from tests.models.harness import CASES, CPU, NUM_LAYERS, VOCAB, save, transformers_model

LAYERS = (1, 3, NUM_LAYERS)
FAMILIES = pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "llama", "llama 3"])


def multi_exit_checkpoint(name, folder, layers=LAYERS):
    """A checkpoint that holds exit heads and conversion matrices both, and transformers' model."""
    theirs = transformers_model(*CASES[name])
    save(theirs, folder)
    hidden = theirs.config.hidden_size
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for k in layers:
        tensors[f"name_to_lm_exit_head.lm_head_{k}.weight"] = torch.randn(
            VOCAB, hidden, generator=generator
        )
        if k < NUM_LAYERS:
            tensors[f"name_to_conv_matrix.{k}_to_{NUM_LAYERS}.weight"] = torch.randn(
                hidden, hidden, generator=generator
            )
    save_file(tensors, folder / "model.safetensors")
    return theirs, tensors


def parts_of(theirs, tap):
    base = theirs.base_model
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    return norm(tap), theirs.lm_head.weight


def opened(folder, mode, layers=LAYERS):
    checkpoint = open_checkpoint(folder, lm_head_layer_indices=layers, vocab_projection_mode=mode)
    return build_model(checkpoint, CPU, torch.float32)


def logits(model, head, tap):
    operands = model.heads.operands(head, tap)
    assert operands.bias is None
    return operands.hidden @ operands.weight.T


@pytest.fixture
def tap():
    return torch.randn(5, 48, generator=torch.Generator().manual_seed(6)) * 3


@FAMILIES
@pytest.mark.parametrize("layer", LAYERS)
@torch.inference_mode()
def test_layer_specific_projection(name, layer, tap, tmp_path):
    theirs, tensors = multi_exit_checkpoint(name, tmp_path)
    z, _ = parts_of(theirs, tap)
    expected = z @ tensors[f"name_to_lm_exit_head.lm_head_{layer}.weight"].T
    actual = logits(opened(tmp_path, Mode.LAYER_SPECIFIC_PROJECTION), Head(layer), tap)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@FAMILIES
@pytest.mark.parametrize("layer", [1, 3])
@torch.inference_mode()
def test_cast_projection_below_the_last_layer(name, layer, tap, tmp_path):
    theirs, tensors = multi_exit_checkpoint(name, tmp_path)
    z, lm_head = parts_of(theirs, tap)
    expected = z @ tensors[f"name_to_conv_matrix.{layer}_to_{NUM_LAYERS}.weight"].T @ lm_head.T
    actual = logits(opened(tmp_path, Mode.SHARED_PROJECTION_CAST_OUTPUTS), Head(layer), tap)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@FAMILIES
@pytest.mark.parametrize("layer", LAYERS)
@torch.inference_mode()
def test_direct_projection(name, layer, tap, tmp_path):
    theirs, _ = multi_exit_checkpoint(name, tmp_path)
    z, lm_head = parts_of(theirs, tap)
    actual = logits(opened(tmp_path, Mode.SHARED_PROJECTION_DIRECT), Head(layer), tap)
    torch.testing.assert_close(actual, z @ lm_head.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "mode", [Mode.SHARED_PROJECTION_CAST_OUTPUTS, Mode.SHARED_PROJECTION_DIRECT]
)
@torch.inference_mode()
def test_shared_exit_of_the_last_layer_is_the_original_head(mode, tap, tmp_path):
    multi_exit_checkpoint("gpt2", tmp_path)
    model = opened(tmp_path, mode)
    exit_logits = logits(model, Head(NUM_LAYERS), tap)
    assert torch.equal(exit_logits, logits(model, model.heads.original, tap))


@torch.inference_mode()
def test_layer_specific_exit_of_the_last_layer_is_not_the_original_head(tap, tmp_path):
    theirs, _ = multi_exit_checkpoint("gpt2", tmp_path)
    model = opened(tmp_path, Mode.LAYER_SPECIFIC_PROJECTION)
    z, lm_head = parts_of(theirs, tap)
    original = logits(model, model.heads.original, tap)
    torch.testing.assert_close(original, z @ lm_head.T, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(logits(model, Head(NUM_LAYERS), tap), original)


def test_only_required_heads_are_loaded(tmp_path, monkeypatch):
    multi_exit_checkpoint("gpt2", tmp_path)
    model = opened(tmp_path, Mode.LAYER_SPECIFIC_PROJECTION)
    asked = []
    weights = model.heads._loader.weights
    get = weights.get
    monkeypatch.setattr(weights, "get", lambda name: asked.append(name) or get(name))
    for _ in range(2):
        model.heads.require(Head(3))
        model.heads.require(model.heads.original)
    assert asked == ["name_to_lm_exit_head.lm_head_3.weight"]


def test_an_exit_that_the_model_lacks_is_named_with_those_it_has(tmp_path):
    multi_exit_checkpoint("gpt2", tmp_path)
    model = opened(tmp_path, Mode.LAYER_SPECIFIC_PROJECTION)
    with pytest.raises(ValueError, match=r"layer 2 has no exit: .*\[1, 3, 4\]"):
        model.heads.require(Head(2))


def test_a_model_without_exits_says_so(tmp_path):
    save(transformers_model(*CASES["gpt2"]), tmp_path)
    model = build_model(open_checkpoint(tmp_path), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"layer 4 has no exit: this model has no exits"):
        model.heads.require(Head(4))


def test_the_original_head_reads_the_last_layer_only(tmp_path):
    save(transformers_model(*CASES["gpt2"]), tmp_path)
    model = build_model(open_checkpoint(tmp_path), CPU, torch.float32)
    with pytest.raises(ValueError, match="original head reads layer 4"):
        model.heads.require(Head(2, is_original=True))
