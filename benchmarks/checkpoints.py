"""Random multi-exit checkpoints of the sizes that people know, in IBM's layout.

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
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

LOGIT_SPREAD = 2.8
KEPT_CHECKPOINTS = Path(tempfile.gettempdir(), "multiexit-bench")


@dataclass(frozen=True)
class Shape:
    """A model size: transformers' classes and config, its exits, and the contrasted pair."""

    name: str
    model_class: type
    config: GPT2Config | GPTNeoConfig
    exits: tuple[int, ...]
    upper: int
    lower: int


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
SHAPES = {shape.name: shape for shape in (GPT2_MEDIUM, GPT_NEO_125M, TINY)}


def make_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype) -> Path:
    """The folder of a random checkpoint with a head for every exit; made if it is not there."""
    target = folder / f"{shape.name}-{str(dtype).removeprefix('torch.')}"
    if (target / "model.safetensors").exists():
        return target
    torch.manual_seed(0)
    model = shape.model_class(shape.config)
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    vocab, hidden = shape.config.vocab_size, shape.config.hidden_size
    for layer in shape.exits:
        head = torch.randn(vocab, hidden).mul_(LOGIT_SPREAD * hidden**-0.5).to(dtype)
        tensors[f"name_to_lm_exit_head.lm_head_{layer}.weight"] = head
    config = shape.config.to_dict() | {
        "lm_head_layer_indices": list(shape.exits)[::-1],
        "eos_token_id": None,
        "bos_token_id": None,
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    type(shape.config).from_dict(config).save_pretrained(target)
    return target
