"""What a checkpoint stores and what the model computes in may differ."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.errors import CheckpointError
from multiexit_engine.models import build_model
from tests.models.harness import (
    CASES,
    CPU,
    assert_equal_up_to_rounding,
    expected_taps,
    run_text,
    save,
    transformers_model,
)

TEXT = [5, 17, 99, 3, 3, 42, 0, 61, 8]
FAMILIES = pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "llama", "qwen3"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def in_float32(folder):
    """transformers' model read anew: ``.float()`` would keep rotary frequencies rounded."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@FAMILIES
@HALVES
def test_half_precision_files_computed_in_float32_equal_transformers(tmp_path, name, dtype):
    theirs = transformers_model(*CASES[name]).to(dtype)
    checkpoint = open_checkpoint(save(theirs, tmp_path))
    assert checkpoint.dtype is dtype
    ours = build_model(checkpoint, CPU, torch.float32)
    expected = expected_taps(in_float32(tmp_path), TEXT)[-1]
    assert_equal_up_to_rounding(run_text(ours, TEXT, 4)[-1], expected)


@FAMILIES
@HALVES
def test_half_precision_computation_stays_near_float32(tmp_path, name, dtype):
    theirs = transformers_model(*CASES[name]).to(dtype)
    ours = build_model(open_checkpoint(save(theirs, tmp_path)), CPU, dtype)
    actual = run_text(ours, TEXT, 4)[-1]
    assert actual.dtype in (dtype, torch.float32)
    expected = expected_taps(in_float32(tmp_path), TEXT)[-1]
    assert_equal_up_to_rounding(actual.float(), expected, 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_is_contiguous_in_the_asked_dtype(tmp_path, dtype):
    checkpoint = open_checkpoint(save(transformers_model(*CASES["gpt2"]), tmp_path))
    for name, parameter in build_model(checkpoint, CPU, dtype).named_parameters():
        assert parameter.is_contiguous() and parameter.dtype is dtype, name


def test_an_unknown_activation_is_named(tmp_path):
    model_type, values = CASES["gpt2"]
    theirs = transformers_model(model_type, {**values, "activation_function": "mish"})
    with pytest.raises(CheckpointError, match="activation 'mish'.*supported are.*gelu_new"):
        build_model(open_checkpoint(save(theirs, tmp_path)), CPU, torch.float32)
