"""GPT-Neo: unscaled attention, layers that alternate global and local.

What is local stands in ``ModelConfig.attention_windows``.
"""

from __future__ import annotations

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.linear import Linear
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.models.gpt import build_gpt
from multiexit_engine.models.loading import load_linear


def build_gpt_neo(config: ModelConfig, loader: TensorLoader) -> MultiExitModel:
    """Load a GPT-Neo model; raises CheckpointError when a tensor is missing or misshapen."""
    return build_gpt(config, loader, _attention, load_linear, config.family["intermediate_size"])


def _attention(config: ModelConfig, loader: TensorLoader, name: str, layer: int) -> SelfAttention:
    name, width = f"{name}.attn.attention", config.hidden_size
    names = [f"{name}.{part}_proj.weight" for part in "qkv"]
    return SelfAttention(
        config,
        layer,
        qkv=Linear(loader.load_stacked(names, [width] * 3, width)),
        output=load_linear(loader, f"{name}.out_proj", width, width),
        scale=1.0,
    )
