"""Random multi-exit checkpoints of the sizes that people know, in IBM's layout or with one head.

Weights are random. Only the heads' scale matters for speed: contrast reads the lower head's rows of
the plausible tokens, and logits are given the spread of GPT-2's (standard deviation 2.8), at which
some twenty tokens are plausible. Made once, kept in a folder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

LOGIT_SPREAD = 2.8
EXIT_HEAD = "name_to_lm_exit_head.lm_head_{}"
KEPT_CHECKPOINTS = Path(tempfile.gettempdir(), "multiexit-bench")


@dataclass(frozen=True)
class Shape:
    """A model size: transformers' classes and config, its exits, and the contrasted pair.

    Exits have heads of their own unless ``shares_head``.
    """

    name: str
    model_class: type
    config: GPT2Config | GPTNeoConfig | LlamaConfig
    exits: tuple[int, ...]
    upper: int
    lower: int
    shares_head: bool = False


GPT2_MEDIUM = Shape(
    "gpt2-medium",
    GPT2LMHeadModel,
    GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    tuple(range(2, 25, 2)),
    24,
    12,
)
GPT_NEO_125M = Shape(
    "gpt-neo-125m",
    GPTNeoForCausalLM,
    GPTNeoConfig(
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
        window_size=256,
        max_position_embeddings=2048,
    ),
    tuple(range(2, 13, 2)),
    12,
    6,
)
LLAMA_8B = Shape(
    "llama-8b",
    LlamaForCausalLM,
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    ),
    (16, 32),
    32,
    16,
    shares_head=True,
)
TINY = Shape(
    "tiny",
    GPT2LMHeadModel,
    GPT2Config(
        n_layer=4,
        n_embd=64,
        n_head=2,
        vocab_size=1031,
        n_positions=256,
        bos_token_id=None,
        eos_token_id=None,
    ),
    (2, 4),
    4,
    2,
)
TINY_LLAMA = Shape(
    "tiny-llama",
    LlamaForCausalLM,
    LlamaConfig(
        vocab_size=1031,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    ),
    (2, 4),
    4,
    2,
    shares_head=True,
)
SHAPES = {s.name: s for s in (GPT2_MEDIUM, GPT_NEO_125M, LLAMA_8B, TINY, TINY_LLAMA)}


def make_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype, device: str = "cpu") -> Path:
    """The folder of a random checkpoint, made on a device if it is not there."""
    target = folder / f"{shape.name}-{str(dtype).removeprefix('torch.')}"
    if (target / "model.safetensors").exists():
        return target
    torch.manual_seed(0)
    with torch.device(device):
        model = shape.model_class(shape.config)
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding, or made below
    }
    vocab, hidden = shape.config.vocab_size, shape.config.hidden_size
    names = ["lm_head"] if shape.shares_head else map(EXIT_HEAD.format, shape.exits)
    for name in names:
        head = torch.randn(vocab, hidden, device=device).mul_(LOGIT_SPREAD * hidden**-0.5)
        tensors[f"{name}.weight"] = head.to(dtype)
    config = shape.config.to_dict() | {
        "lm_head_layer_indices": list(shape.exits)[::-1],
        "eos_token_id": None,
        "bos_token_id": None,
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    type(shape.config).from_dict(config).save_pretrained(target)
    return target


def demo_or_random(shape: str, dtype: torch.dtype) -> Path | str:
    """The demo model, or random weights of the shape with this name."""
    return "demo" if shape == "demo" else make_checkpoint(SHAPES[shape], KEPT_CHECKPOINTS, dtype)
