"""T5: pre-norm blocks without biases, and positions that only bias attention by distance.

Source: Raffel et al. 2020, arXiv:1910.10683; ``T5ForConditionalGeneration`` of transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import EncoderConfig, ModelConfig
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.block import Block, DecoderBlock
from multiexit_engine.layers.cross_attention import CrossAttention
from multiexit_engine.layers.embedding import Embedding
from multiexit_engine.layers.encoder_attention import EncoderAttention
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.layers.linear import Linear
from multiexit_engine.layers.mlp import MLP, GatedMLP
from multiexit_engine.layers.norm import RMSNorm
from multiexit_engine.models.base import load_original_head
from multiexit_engine.models.encoder_decoder import Encoder, EncoderDecoderModel, load_cross

_SCALE = 1.0  # T5's scores are not scaled


def build_t5(config: ModelConfig, loader: TensorLoader) -> EncoderDecoderModel:
    """Load a T5 model; raises CheckpointError when a tensor is missing or misshapen."""
    assert config.encoder is not None
    tokens = loader.load("shared.weight", config.vocab_size, config.hidden_size)
    final_norm = _norm(config, loader, "decoder.final_layer_norm")
    if config.family["scale_decoder_outputs"]:
        # all heads multiply what this norm gives
        scaled = final_norm.weight * config.hidden_size**-0.5
        final_norm = RMSNorm(scaled, final_norm.eps)
    layers = range(config.num_layers)
    names = [f"decoder.block.{i}.layer.1.EncDecAttention.{part}" for i in layers for part in "kv"]
    return EncoderDecoderModel(
        config,
        _encoder(config, config.encoder, loader, tokens),
        Embedding(tokens),
        _decoder_blocks(config, loader),
        ExitHeads(config, loader, final_norm, load_original_head(config, loader, tokens)),
        load_cross(loader, config, names, biased=False),
    )


def distance_bias(table: Tensor, max_distance: int, *, both_ways: bool) -> Tensor:
    """A bias for each distance, from one for each bucket of distances.

    Args:
        table: [buckets, heads], as stored.
        max_distance: from here on all distances share a bucket.
        both_ways: keys may stand after their query; half of the buckets are for them.

    Returns:
        [heads, max_distance + 1] for the distances 0 to ``max_distance``, or [heads,
        2 * max_distance + 1] for those from ``-max_distance`` on.

    Source: ``T5Attention._relative_position_bucket`` of transformers.
    """
    count = table.shape[0] // 2 if both_ways else table.shape[0]
    exact = count // 2
    distance = torch.arange(max_distance + 1, device=table.device)
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
    before = torch.where(distance < exact, distance, far)
    if not both_ways:
        return table[before].T.contiguous()
    after = before[1:].flip(0) + count
    return table[torch.cat([after, before])].T.contiguous()


def _encoder(
    config: ModelConfig, encoder: EncoderConfig, loader: TensorLoader, tokens: Tensor
) -> Encoder:
    bias = _bias(config, loader, "encoder", both_ways=True)
    blocks = []
    for layer in range(encoder.num_layers):
        name = f"encoder.block.{layer}.layer"
        attention = EncoderAttention(
            _stacked(config, loader, f"{name}.0.SelfAttention", "qkv"),
            _output(config, loader, f"{name}.0.SelfAttention"),
            encoder.head_dim,
            _SCALE,
            bias,
        )
        blocks.append(
            Block(
                _norm(config, loader, f"{name}.0.layer_norm"),
                attention,
                _norm(config, loader, f"{name}.1.layer_norm"),
                _mlp(config, loader, f"{name}.1.DenseReluDense"),
            )
        )
    return Encoder(Embedding(tokens), blocks, _norm(config, loader, "encoder.final_layer_norm"))


def _decoder_blocks(config: ModelConfig, loader: TensorLoader) -> list[DecoderBlock]:
    bias = _bias(config, loader, "decoder", both_ways=False)
    blocks = []
    for layer in range(config.num_layers):
        name = f"decoder.block.{layer}.layer"
        attention = SelfAttention(
            config,
            layer,
            _stacked(config, loader, f"{name}.0.SelfAttention", "qkv"),
            _output(config, loader, f"{name}.0.SelfAttention"),
            _SCALE,
            bias=bias,
        )
        cross = CrossAttention(
            layer,
            _stacked(config, loader, f"{name}.1.EncDecAttention", "q"),
            _output(config, loader, f"{name}.1.EncDecAttention"),
            config.head_dim,
            _SCALE,
        )
        blocks.append(
            DecoderBlock(
                _norm(config, loader, f"{name}.0.layer_norm"),
                attention,
                _norm(config, loader, f"{name}.2.layer_norm"),
                _mlp(config, loader, f"{name}.2.DenseReluDense"),
                _norm(config, loader, f"{name}.1.layer_norm"),
                cross,
            )
        )
    return blocks


def _bias(config: ModelConfig, loader: TensorLoader, stack: str, *, both_ways: bool) -> Tensor:
    """What all layers of a stack share; the first one holds it."""
    family = config.family
    name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    table = loader.load(name, family["relative_attention_num_buckets"], config.num_heads)
    return distance_bias(table, family["relative_attention_max_distance"], both_ways=both_ways)


def _stacked(config: ModelConfig, loader: TensorLoader, name: str, parts: str) -> Linear:
    rows = [config.num_heads * config.head_dim] * len(parts)
    names = [f"{name}.{part}.weight" for part in parts]
    return Linear(loader.load_stacked(names, rows, config.hidden_size))


def _output(config: ModelConfig, loader: TensorLoader, name: str) -> Linear:
    width = config.num_heads * config.head_dim
    return Linear(loader.load_weight(f"{name}.o.weight", config.hidden_size, width))


def _mlp(config: ModelConfig, loader: TensorLoader, name: str) -> MLP | GatedMLP:
    width, family = config.hidden_size, config.family
    inner, kind = family["d_ff"], family["dense_act_fn"]
    down = Linear(loader.load_weight(f"{name}.wo.weight", width, inner))
    if not family["is_gated_act"]:
        return MLP(Linear(loader.load_weight(f"{name}.wi.weight", inner, width)), down, kind)
    names = [f"{name}.wi_0.weight", f"{name}.wi_1.weight"]
    return GatedMLP(Linear(loader.load_stacked(names, [inner] * 2, width)), down, kind)


def _norm(config: ModelConfig, loader: TensorLoader, name: str) -> RMSNorm:
    weight = loader.load(f"{name}.weight", config.hidden_size)
    return RMSNorm(weight, config.family["layer_norm_epsilon"])
