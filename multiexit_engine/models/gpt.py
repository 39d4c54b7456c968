"""What GPT-2 and GPT-Neo share: learned positions, and pre-norm blocks with a plain MLP."""

from __future__ import annotations

from collections.abc import Callable

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.attention import SelfAttention
from multiexit_engine.layers.block import DecoderBlock
from multiexit_engine.layers.embedding import Embedding
from multiexit_engine.layers.exit_heads import ExitHeads
from multiexit_engine.layers.linear import Linear
from multiexit_engine.layers.mlp import MLP
from multiexit_engine.models.base import MultiExitModel, load_original_head
from multiexit_engine.models.loading import load_layer_norm


def build_gpt(
    config: ModelConfig,
    loader: TensorLoader,
    attention: Callable[[ModelConfig, TensorLoader, str, int], SelfAttention],
    linear: Callable[[TensorLoader, str, int, int], Linear],
    inner: int | None,
) -> MultiExitModel:
    """Load a model of these families.

    Args:
        config: of the model.
        loader: of its weights.
        attention: loads a layer's, of the block of this name.
        linear: loads the matrix [rows, columns] and bias of a module as the family stores them.
        inner: width of the MLPs; None for four times the hidden size.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
    """
    width, eps = config.hidden_size, config.family["layer_norm_epsilon"]
    wide = inner or 4 * width

    def block(layer: int) -> DecoderBlock:
        name = f"transformer.h.{layer}"
        return DecoderBlock(
            load_layer_norm(loader, f"{name}.ln_1", width, eps),
            attention(config, loader, name, layer),
            load_layer_norm(loader, f"{name}.ln_2", width, eps),
            MLP(
                up=linear(loader, f"{name}.mlp.c_fc", wide, width),
                down=linear(loader, f"{name}.mlp.c_proj", width, wide),
                kind=config.family["activation_function"],
            ),
        )

    tokens = loader.load("transformer.wte.weight", config.vocab_size, width)
    positions = loader.load("transformer.wpe.weight", config.max_position_embeddings, width)
    final_norm = load_layer_norm(loader, "transformer.ln_f", width, eps)
    return MultiExitModel(
        config,
        Embedding(tokens, positions),
        [block(layer) for layer in range(config.num_layers)],
        ExitHeads(config, loader, final_norm, load_original_head(config, loader, tokens)),
    )
