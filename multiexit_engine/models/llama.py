"""Llama and the families built like it: Mistral, Qwen2, Qwen3.

They differ in biases, in norms of query and key heads, and in attention windows, which stand in
``ModelConfig.attention_windows``.
"""

from __future__ import annotations

from typing import NamedTuple

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import ModelConfig
from multiexit_engine.errors import CheckpointError
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.block import DecoderBlock
from multiexit_engine.layers.embedding import Embedding
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.layers.linear import Linear
from multiexit_engine.layers.mlp import GatedMLP
from multiexit_engine.layers.norm import RMSNorm
from multiexit_engine.layers.rotary import Rotary
from multiexit_engine.models.base import MultiExitModel, load_original_head


class _Variant(NamedTuple):
    """In what the families differ."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool


def build_llama(config: ModelConfig, loader: TensorLoader) -> MultiExitModel:
    """Load a model of these families; raises CheckpointError for missing or misshapen tensors."""
    if config.rope is None:
        raise CheckpointError(f"a {config.model_type} config needs rope_parameters")
    width = config.hidden_size
    tokens = loader.load("model.embed_tokens.weight", config.vocab_size, width)
    rotary = Rotary(config.rope, config.max_position_embeddings, loader.device, loader.dtype)
    variant = _variant(config)
    final_norm = _norm(config, loader, "model.norm", width)
    return MultiExitModel(
        config,
        Embedding(tokens),
        [_block(config, variant, loader, rotary, layer) for layer in range(config.num_layers)],
        ExitHeads(config, loader, final_norm, load_original_head(config, loader, tokens)),
    )


def _variant(config: ModelConfig) -> _Variant:
    biased = bool(config.family.get("attention_bias", False))
    match config.model_type:
        case "qwen2":
            return _Variant(True, False, False, head_norms=False)
        case "qwen3":
            return _Variant(biased, biased, False, head_norms=True)
        case "mistral":
            return _Variant(False, False, False, head_norms=False)
        case _:
            return _Variant(biased, biased, bool(config.family["mlp_bias"]), head_norms=False)


def _block(
    config: ModelConfig, variant: _Variant, loader: TensorLoader, rotary: Rotary, layer: int
) -> DecoderBlock:
    name = f"model.layers.{layer}"
    width, inner = config.hidden_size, config.family["intermediate_size"]
    return DecoderBlock(
        _norm(config, loader, f"{name}.input_layernorm", width),
        _attention(config, variant, loader, rotary, layer),
        _norm(config, loader, f"{name}.post_attention_layernorm", width),
        GatedMLP(
            gate_up=_linear(
                loader,
                [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"],
                [inner, inner],
                width,
                variant.mlp_bias,
            ),
            down=_linear(loader, [f"{name}.mlp.down_proj"], [width], inner, variant.mlp_bias),
            kind=config.family["hidden_act"],
        ),
    )


def _attention(
    config: ModelConfig, variant: _Variant, loader: TensorLoader, rotary: Rotary, layer: int
) -> SelfAttention:
    name = f"model.layers.{layer}.self_attn"
    width, head_dim = config.hidden_size, config.head_dim
    query_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    query_norm, key_norm = (
        _norm(config, loader, f"{name}.{part}_norm", head_dim) if variant.head_norms else None
        for part in "qk"
    )
    return SelfAttention(
        config,
        layer,
        qkv=_linear(
            loader,
            [f"{name}.{part}_proj" for part in "qkv"],
            [query_width, kv_width, kv_width],
            width,
            variant.qkv_bias,
        ),
        output=_linear(loader, [f"{name}.o_proj"], [width], query_width, variant.output_bias),
        scale=head_dim**-0.5,
        rotary=rotary,
        query_norm=query_norm,
        key_norm=key_norm,
    )


def _linear(
    loader: TensorLoader, names: list[str], rows: list[int], columns: int, has_bias: bool
) -> Linear:
    weight = loader.load_stacked([f"{n}.weight" for n in names], rows, columns)
    bias = None
    if has_bias:
        bias = loader.load_stacked_biases([f"{n}.bias" for n in names], rows)
    return Linear(weight, bias)


def _norm(config: ModelConfig, loader: TensorLoader, name: str, width: int) -> RMSNorm:
    return RMSNorm(loader.load(f"{name}.weight", width), config.family["rms_norm_eps"])
