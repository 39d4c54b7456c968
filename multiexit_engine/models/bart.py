"""BART: post-norm blocks, learned positions, and a bias on the logits.

Source: Lewis et al. 2019, arXiv:1910.13461; ``BartForConditionalGeneration`` of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import EncoderConfig, ModelConfig
from multiexit_engine.errors import CheckpointError
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.block import Block, DecoderBlock
from multiexit_engine.layers.cross_attention import CrossAttention
from multiexit_engine.layers.embedding import NormedEmbedding
from multiexit_engine.layers.encoder_attention import EncoderAttention
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.layers.linear import Linear
from multiexit_engine.layers.mlp import MLP
from multiexit_engine.layers.norm import LayerNorm
from multiexit_engine.models.base import load_original_head
from multiexit_engine.models.encoder_decoder import Encoder, EncoderDecoderModel, load_cross
from multiexit_engine.models.loading import load_layer_norm, load_linear

_EPSILON = 1e-5  # not a switch of the config
_FIRST_POSITION = 2  # row of the table that belongs to position 0
# what older configs say of their model; mBART and others differ in these
_FIXED = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
    "extra_pos_embeddings": _FIRST_POSITION,
}


def build_bart(config: ModelConfig, loader: TensorLoader) -> EncoderDecoderModel:
    """Load a BART model; raises CheckpointError when a tensor is missing or misshapen."""
    assert config.encoder is not None
    _check(config)
    tokens = loader.load("model.shared.weight", config.vocab_size, config.hidden_size)
    layers = range(config.num_layers)
    names = [f"model.decoder.layers.{i}.encoder_attn.{p}_proj" for i in layers for p in "kv"]
    return EncoderDecoderModel(
        config,
        Encoder(
            _embedding(config, loader, "model.encoder", tokens),
            [
                _encoder_block(config, config.encoder, loader, layer)
                for layer in range(config.encoder.num_layers)
            ],
        ),
        _embedding(config, loader, "model.decoder", tokens),
        [_decoder_block(config, loader, layer) for layer in layers],
        ExitHeads(
            config, loader, None, load_original_head(config, loader, tokens), _bias(config, loader)
        ),
        load_cross(loader, config, names, biased=True),
    )


def _check(config: ModelConfig) -> None:
    for name, value in _FIXED.items():
        if config.family.get(name, value) != value:
            raise CheckpointError(
                f"{name}={config.family[name]!r} in config.json: BART has {value!r}; the "
                "checkpoint is of another architecture"
            )


def _bias(config: ModelConfig, loader: TensorLoader) -> Tensor | None:
    """[vocab] added to the logits; None where it is zero, as in all models of Facebook's."""
    if "final_logits_bias" not in loader.weights:
        return None
    bias = loader.load("final_logits_bias", 1, config.vocab_size)[0]
    return bias if bool(torch.any(bias)) else None


def _embedding(
    config: ModelConfig, loader: TensorLoader, name: str, shared: Tensor
) -> NormedEmbedding:
    width = config.hidden_size
    tokens, own = shared, f"{name}.embed_tokens.weight"
    if own in loader.weights:
        stored = loader.load(own, config.vocab_size, width)
        tokens = shared if torch.equal(stored, shared) else stored
    positions = config.max_position_embeddings + _FIRST_POSITION
    return NormedEmbedding(
        tokens,
        loader.load(f"{name}.embed_positions.weight", positions, width),
        _norm(config, loader, f"{name}.layernorm_embedding"),
        width**0.5 if config.family["scale_embedding"] else 1.0,
        _FIRST_POSITION,
    )


def _encoder_block(
    config: ModelConfig, encoder: EncoderConfig, loader: TensorLoader, layer: int
) -> Block:
    name = f"model.encoder.layers.{layer}"
    return Block(
        _norm(config, loader, f"{name}.self_attn_layer_norm"),
        EncoderAttention(
            _qkv(config, loader, f"{name}.self_attn"),
            _square(config, loader, f"{name}.self_attn.out_proj"),
            encoder.head_dim,
            encoder.head_dim**-0.5,
        ),
        _norm(config, loader, f"{name}.final_layer_norm"),
        _mlp(config, loader, name, config.family["encoder_ffn_dim"]),
        is_post_norm=True,
    )


def _decoder_block(config: ModelConfig, loader: TensorLoader, layer: int) -> DecoderBlock:
    name = f"model.decoder.layers.{layer}"
    scale = config.head_dim**-0.5
    return DecoderBlock(
        _norm(config, loader, f"{name}.self_attn_layer_norm"),
        SelfAttention(
            config,
            layer,
            _qkv(config, loader, f"{name}.self_attn"),
            _square(config, loader, f"{name}.self_attn.out_proj"),
            scale,
        ),
        _norm(config, loader, f"{name}.final_layer_norm"),
        _mlp(config, loader, name, config.family["decoder_ffn_dim"]),
        _norm(config, loader, f"{name}.encoder_attn_layer_norm"),
        CrossAttention(
            layer,
            _square(config, loader, f"{name}.encoder_attn.q_proj"),
            _square(config, loader, f"{name}.encoder_attn.out_proj"),
            config.head_dim,
            scale,
        ),
        is_post_norm=True,
    )


def _mlp(config: ModelConfig, loader: TensorLoader, name: str, inner: int) -> MLP:
    width, family = config.hidden_size, config.family
    return MLP(
        load_linear(loader, f"{name}.fc1", inner, width),
        load_linear(loader, f"{name}.fc2", width, inner),
        kind=family["activation_function"],
    )


def _qkv(config: ModelConfig, loader: TensorLoader, name: str) -> Linear:
    names, rows = [f"{name}.{part}_proj" for part in "qkv"], [config.hidden_size] * 3
    return Linear(
        loader.load_stacked([f"{n}.weight" for n in names], rows, config.hidden_size),
        loader.load_stacked_biases([f"{n}.bias" for n in names], rows),
    )


def _square(config: ModelConfig, loader: TensorLoader, name: str) -> Linear:
    return load_linear(loader, name, config.hidden_size, config.hidden_size)


def _norm(config: ModelConfig, loader: TensorLoader, name: str) -> LayerNorm:
    return load_layer_norm(loader, name, config.hidden_size, _EPSILON)
