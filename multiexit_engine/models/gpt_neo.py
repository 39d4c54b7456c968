"""GPT-Neo: learned positions, unscaled attention, layers that alternate global and local.

What is local stands in ``ModelConfig.attention_windows``.
"""

from __future__ import annotations

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


def build_gpt_neo(config: ModelConfig, loader: TensorLoader) -> MultiExitModel:
    """Load a GPT-Neo model; raises CheckpointError when a tensor is missing or misshapen."""
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
    inner = config.family["intermediate_size"] or 4 * width
    attention = f"{name}.attn.attention"
    qkv = loader.load_stacked(
        [f"{attention}.{part}_proj.weight" for part in "qkv"], [width] * 3, width
    )
    return DecoderBlock(
        _norm(config, loader, f"{name}.ln_1"),
        SelfAttention(
            config,
            layer,
            qkv=Linear(qkv),
            output=_linear(loader, f"{attention}.out_proj", width, width),
            scale=1.0,
        ),
        _norm(config, loader, f"{name}.ln_2"),
        MLP(
            up=_linear(loader, f"{name}.mlp.c_fc", inner, width),
            down=_linear(loader, f"{name}.mlp.c_proj", width, inner),
            kind=config.family["activation_function"],
        ),
    )


def _linear(loader: TensorLoader, name: str, rows: int, columns: int) -> Linear:
    weight = loader.load_weight(f"{name}.weight", rows, columns)
    return Linear(weight, loader.load(f"{name}.bias", rows))


def _norm(config: ModelConfig, loader: TensorLoader, name: str) -> LayerNorm:
    weight = loader.load(f"{name}.weight", config.hidden_size)
    bias = loader.load(f"{name}.bias", config.hidden_size)
    return LayerNorm(weight, bias, config.family["layer_norm_epsilon"])
