"""GPT-2: fused attention weights, and matrices that are stored transposed."""

from __future__ import annotations

from typing import Any

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.linear import Linear
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.models.gpt import build_gpt


def build_gpt2(config: ModelConfig, loader: TensorLoader) -> MultiExitModel:
    """Load a GPT-2 model; raises CheckpointError when a tensor is missing or misshapen."""
    return build_gpt(config, loader, _attention, _conv1d, config.family["n_inner"])


def _attention(config: ModelConfig, loader: TensorLoader, name: str, layer: int) -> SelfAttention:
    width = config.hidden_size
    return SelfAttention(
        config,
        layer,
        qkv=_conv1d(loader, f"{name}.attn.c_attn", 3 * width, width),
        output=_conv1d(loader, f"{name}.attn.c_proj", width, width),
        scale=_scale(config.family, config.head_dim, layer),
    )


def _scale(family: Any, head_dim: int, layer: int) -> float:
    scale = head_dim**-0.5 if family["scale_attn_weights"] else 1.0
    return float(scale / (layer + 1) if family["scale_attn_by_inverse_layer_idx"] else scale)


def _conv1d(loader: TensorLoader, name: str, rows: int, columns: int) -> Linear:
    weight = loader.load_transposed(f"{name}.weight", rows, columns)
    return Linear(weight, loader.load(f"{name}.bias", rows))
