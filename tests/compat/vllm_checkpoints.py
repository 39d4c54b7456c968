"""Tiny random checkpoints of every family that the vLLM plug-in has, with exits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.tiny import EXITS, byte_tokenizer

NUM_LAYERS, WIDTH, VOCAB = 6, 128, 512
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def save_gpt_neo(folder: Path) -> Path:
    """Windows of 8 tokens in every other layer, exits that convert their states."""
    torch.manual_seed(0)
    kinds = [[["global", "local"], NUM_LAYERS // 2]]
    config = GPTNeoConfig(
        num_layers=NUM_LAYERS, num_heads=4, attention_types=kinds, window_size=8, **COMMON
    )
    own = {
        f"name_to_conv_matrix.{layer}_to_{NUM_LAYERS}.weight": torch.eye(WIDTH)
        + 0.1 * torch.randn(WIDTH, WIDTH)
        for layer in EXITS
        if layer < NUM_LAYERS
    }
    mode = "SHARED_PROJECTION_CAST_OUTPUTS"
    return _save(folder, GPTNeoForCausalLM(config), own, mode, "MultiExitGPTNeo")


def save_llama(folder: Path) -> Path:
    """Two query heads for each key, exits with heads of their own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        **COMMON,
    )
    own = {
        f"name_to_lm_exit_head.lm_head_{layer}.weight": 0.4 * torch.randn(VOCAB, WIDTH)
        for layer in EXITS
    }
    mode = "LAYER_SPECIFIC_PROJECTION"
    return _save(folder, LlamaForCausalLM(config), own, mode, "MultiExitLlama")


def _save(folder, model, own, mode, architecture):
    config = model.config
    config.lm_head_layer_indices = list(EXITS)
    config.vocab_projection_mode = mode
    config.architectures = [architecture]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = model.state_dict() | own
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    byte_tokenizer().save_pretrained(folder)
    return folder
