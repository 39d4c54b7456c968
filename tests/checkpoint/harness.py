"""A small GPT-2 checkpoint made of random tensors, and ways to damage it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, HIDDEN, VOCAB = 4, 8, 13
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 16,
    "eos_token_id": 7,
    "bos_token_id": 7,
}


def head_name(layer: int) -> str:
    return f"name_to_lm_exit_head.lm_head_{layer}.weight"


def matrix_name(layer: int) -> str:
    return f"name_to_conv_matrix.{layer}_to_{LAYERS}.weight"


def base_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "transformer.wte.weight": normal(VOCAB, HIDDEN),
        "transformer.wpe.weight": normal(16, HIDDEN),
        "transformer.ln_f.weight": normal(HIDDEN),
        "transformer.ln_f.bias": normal(HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            tensors[f"{name}.{norm}.weight"] = normal(HIDDEN)
            tensors[f"{name}.{norm}.bias"] = normal(HIDDEN)
        for part, rows, columns in (
            ("attn.c_attn", HIDDEN, 3 * HIDDEN),
            ("attn.c_proj", HIDDEN, HIDDEN),
            ("mlp.c_fc", HIDDEN, 4 * HIDDEN),
            ("mlp.c_proj", 4 * HIDDEN, HIDDEN),
        ):
            tensors[f"{name}.{part}.weight"] = normal(rows, columns)
            tensors[f"{name}.{part}.bias"] = normal(columns)
    return tensors


def heads(*layers: int) -> dict[str, Tensor]:
    return {head_name(k): torch.randn(VOCAB, HIDDEN) for k in layers}


def matrices(*layers: int) -> dict[str, Tensor]:
    return {matrix_name(k): torch.randn(HIDDEN, HIDDEN) for k in layers}


def write_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def write(folder: Path, extra: dict[str, Tensor] | None = None, **changes: object) -> Path:
    """A whole checkpoint in ``model.safetensors``."""
    write_config(folder, **changes)
    save_file({**base_tensors(), **(extra or {})}, folder / "model.safetensors")
    return folder
