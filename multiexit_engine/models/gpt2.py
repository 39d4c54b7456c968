"""GPT-2: learned positions, fused attention weights that are stored transposed."""

from __future__ import annotations

from typing import Any

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.block import DecoderBlock
from multiexit_engine.layers.embedding import Embedding
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.layers.linear import Linear
from multiexit_engine.layers.mlp import MLP
from multiexit_engine.layers.norm import LayerNorm
from multiexit_engine.models.base import MultiExitModel, load_original_head


def build_gpt2(config: ModelConfig, loader: TensorLoader) -> MultiExitModel:
    """Load a GPT-2 model; raises CheckpointError when a tensor is missing or misshapen."""
    width = config.hidden_size
    tokens = loader.load("transformer.wte.weight", config.vocab_size, width)
    positions = loader.load("transformer.wpe.weight", config.max_position_embeddings, width)
    final_norm = _norm(config, loader, "transformer.ln_f")
    return MultiExitModel(
        config,
        Embedding(tokens, positions),
        [_block(config, loader, layer) for layer in range(config.num_layers)],
        ExitHeads(config, loader, final_norm, load_original_head(config, loader, tokens)),
    )


def _block(config: ModelConfig, loader: TensorLoader, layer: int) -> DecoderBlock:
    name = f"transformer.h.{layer}"
    width = config.hidden_size
    inner = config.family["n_inner"] or 4 * width
    return DecoderBlock(
        _norm(config, loader, f"{name}.ln_1"),
        SelfAttention(
            config,
            layer,
            qkv=_conv1d(loader, f"{name}.attn.c_attn", 3 * width, width),
            output=_conv1d(loader, f"{name}.attn.c_proj", width, width),
            scale=_scale(config.family, config.head_dim, layer),
        ),
        _norm(config, loader, f"{name}.ln_2"),
        MLP(
            up=_conv1d(loader, f"{name}.mlp.c_fc", inner, width),
            down=_conv1d(loader, f"{name}.mlp.c_proj", width, inner),
            kind=config.family["activation_function"],
        ),
    )


def _scale(family: Any, head_dim: int, layer: int) -> float:
    scale = head_dim**-0.5 if family["scale_attn_weights"] else 1.0
    return float(scale / (layer + 1) if family["scale_attn_by_inverse_layer_idx"] else scale)


def _conv1d(loader: TensorLoader, name: str, rows: int, columns: int) -> Linear:
    weight = loader.load_transposed(f"{name}.weight", rows, columns)
    return Linear(weight, loader.load(f"{name}.bias", rows))


def _norm(config: ModelConfig, loader: TensorLoader, name: str) -> LayerNorm:
    weight = loader.load(f"{name}.weight", config.hidden_size)
    bias = loader.load(f"{name}.bias", config.hidden_size)
    return LayerNorm(weight, bias, config.family["layer_norm_epsilon"])
