"""Tiny random checkpoints on disk, with a tokenizer that knows every byte."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.checkpoint.probes import FILE_NAME, ProbeWeights, write_probes

EXITS = (2, 4, 6)
END = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the end of text as token 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {END: 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def save_gpt2(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 257,
    num_positions: int = 1024,
    with_tokenizer: bool = True,
    sharpness: float = 8.0,
    num_layers: int = 6,
    num_heads: int = 4,
    exits: tuple[int, ...] = EXITS,
) -> Path:
    """A GPT-2 of six layers with its own head on layers 2, 4 and 6.

    ``sharpness`` scales the heads, so that distributions are far from flat and greedy choices far
    from ties.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=num_positions,
        n_embd=64,
        n_layer=num_layers,
        n_head=num_heads,
        bos_token_id=256 if vocab_size > 256 else 0,
        eos_token_id=256 if vocab_size > 256 else 0,
        initializer_range=0.1,
    )
    tensors = dict(GPT2LMHeadModel(config).state_dict())
    tensors.pop("lm_head.weight")
    for layer in exits:
        head = torch.randn(vocab_size, 64) * 0.05 * sharpness
        tensors[f"name_to_lm_exit_head.lm_head_{layer}.weight"] = head
    config.lm_head_layer_indices = list(reversed(exits))
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if with_tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def save_probes(folder: Path, layers: tuple[int, ...], hidden_size: int = 64) -> Path:
    """Random probes beside a model's weights, which pass about half of the rows at 0.5."""
    weights = open_checkpoint(folder).weights
    made = {}
    for layer in layers:
        draw = torch.Generator().manual_seed(layer)
        up, down = (torch.randn(n, m, generator=draw) for n, m in ((16, hidden_size), (1, 16)))
        made[layer] = ProbeWeights(up / 8, torch.zeros(16), down, torch.zeros(1))
    write_probes(folder / FILE_NAME, made, weights)
    return folder
