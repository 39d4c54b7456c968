"""Bytes of a step, counted from a config, are those of the model's own tensors."""

import pytest
from bytes_read import has_codes, mean_context, step_bytes, weights_of_step
from checkpoints import GPT_NEO_125M, TINY, TINY_LLAMA, Shape
from transformers import GPTNeoConfig, GPTNeoForCausalLM

TINY_NEO = Shape(
    "tiny-neo",
    GPTNeoForCausalLM,
    GPTNeoConfig(
        num_layers=4,
        hidden_size=64,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        vocab_size=131,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    ),
    (2, 4),
    4,
    2,
)


@pytest.mark.parametrize("shape", [TINY, TINY_NEO], ids=lambda shape: shape.name)
def test_all_layers_and_the_head_are_the_model_without_positions(shape):
    model = shape.model_class(shape.config)
    positions = model.transformer.wpe.weight.numel()
    # the head is the tied embedding, so parameters() has it once
    wanted = sum(tensor.numel() for tensor in model.parameters()) - positions
    assert weights_of_step(shape, 4) == wanted


def test_of_a_llama_with_an_untied_head_the_embedding_is_not_counted():
    model = TINY_LLAMA.model_class(TINY_LLAMA.config)
    wanted = sum(tensor.numel() for tensor in model.parameters()) - 1031 * 64
    assert weights_of_step(TINY_LLAMA, 4) == wanted


def test_grouped_queries_cache_fewer_keys_and_values():
    one, two = (step_bytes(TINY_LLAMA, 4, "float32", context) for context in (10, 20))
    assert two - one == 2 * 4 * 32 * 10 * 4


def test_keys_and_values_grow_with_the_context():
    one, two = (step_bytes(TINY, 4, "float32", context) for context in (10, 20))
    assert two - one == 2 * 4 * 64 * 10 * 4


def test_an_int8_weight_costs_its_share_of_a_scale_too():
    ratio = step_bytes(TINY, 4, "int8", 0) / step_bytes(TINY, 4, "float32", 0)
    assert ratio == pytest.approx(34 / 32 / 4)


def test_the_mean_context_lies_in_the_middle_of_the_new_tokens():
    assert mean_context(32, 64) == 64


def test_of_a_head_that_is_read_by_codes_a_byte_of_each_number_counts():
    whole = step_bytes(TINY, 4, "float32", 10)
    coded = step_bytes(TINY, 4, "float32", 10, by_codes=True)
    assert whole - coded == 1031 * (3 * 64 - 12)


def test_small_heads_quantized_ones_and_the_reference_have_no_codes():
    assert not has_codes(TINY, "float32", "auto")
    assert not has_codes(GPT_NEO_125M, "int8", "auto")
    assert not has_codes(GPT_NEO_125M, "float32", "reference")
