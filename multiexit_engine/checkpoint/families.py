"""How each family's config says what every decoder has: transformers' fields to ModelConfig.

Knows transformers' config classes; nothing of weights or exits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from multiexit_engine.checkpoint.rope import read_rope
from multiexit_engine.config import EncoderConfig, ModelConfig
from multiexit_engine.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one model type have in common.

    Attributes:
        prefix: of the base model's tensors.
        embedding: name of the token embedding.
        windows: the attention window of each layer, from a transformers config.
        layers: name of the field that counts the layers of the decoder.
        heads: name of the field that counts the attention heads of the decoder.
        positions: the longest text of a transformers config.
        encoder: the encoder of a transformers config; None for a decoder-only family.
        config_type: model type of transformers' config class, where it is not the family's own.
    """

    prefix: str
    embedding: str
    windows: Callable[[Any], tuple[int | None, ...]]
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    positions: Callable[[Any], int] = attrgetter("max_position_embeddings")
    encoder: Callable[[Any], EncoderConfig] | None = None
    config_type: str | None = None


def _everything(config: Any) -> tuple[int | None, ...]:
    return (None,) * int(config.num_hidden_layers)


def _bart_windows(config: Any) -> tuple[int | None, ...]:
    return (None,) * int(config.decoder_layers)


def _bart_encoder(config: Any) -> EncoderConfig:
    return EncoderConfig(
        num_layers=config.encoder_layers,
        num_heads=config.encoder_attention_heads,
        head_dim=_head_dim(config, config.encoder_attention_heads),
        max_source_len=config.max_position_embeddings,
    )


def _gpt_neo_windows(config: Any) -> tuple[int | None, ...]:
    known = {"global": None, "local": config.window_size}
    if unknown := sorted(set(config.attention_layers) - known.keys()):
        raise CheckpointError(f"attention_types in config.json: {unknown[0]!r} is not in {known}")
    return tuple(known[kind] for kind in config.attention_layers)


def _mistral_windows(config: Any) -> tuple[int | None, ...]:
    return (config.sliding_window,) * int(config.num_hidden_layers)


def _qwen_windows(config: Any) -> tuple[int | None, ...]:
    known = {"full_attention": None, "sliding_attention": config.sliding_window}
    kinds = list(config.layer_types)
    if set(kinds) - known.keys() or len(kinds) != config.num_hidden_layers:
        raise CheckpointError(
            f"layer_types={kinds} in config.json: need {config.num_hidden_layers} items, each "
            f"one of {', '.join(known)}"
        )
    return tuple(known[kind] for kind in kinds)


def _t5_windows(config: Any) -> tuple[int | None, ...]:
    return (None,) * int(config.num_decoder_layers)


def _t5_positions(config: Any) -> int:
    """Distances have no end; texts of the published models' training had 512 tokens."""
    return int(getattr(config, "n_positions", None) or 512)


def _t5_encoder(config: Any) -> EncoderConfig:
    return EncoderConfig(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.d_kv,
        max_source_len=_t5_positions(config),
    )


_BART = Family(
    "model.",
    "model.shared.weight",
    _bart_windows,
    layers="decoder_layers",
    heads="decoder_attention_heads",
    encoder=_bart_encoder,
)
FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.", "transformer.wte.weight", _everything),
    "gpt_neo": Family("transformer.", "transformer.wte.weight", _gpt_neo_windows),
    "llama": Family("model.", "model.embed_tokens.weight", _everything),
    "mistral": Family("model.", "model.embed_tokens.weight", _mistral_windows),
    "qwen2": Family("model.", "model.embed_tokens.weight", _qwen_windows),
    "qwen3": Family("model.", "model.embed_tokens.weight", _qwen_windows),
    "bart": _BART,
    "t5": Family(
        "",
        "shared.weight",
        _t5_windows,
        layers="num_decoder_layers",
        heads="num_heads",
        positions=_t5_positions,
        encoder=_t5_encoder,
    ),
    "elmer": replace(_BART, config_type="bart"),
}


def read_model_config(model_type: str, values: dict[str, Any]) -> ModelConfig:
    """The shape that the content of a config.json describes; exits and ending tokens are left out.

    Raises:
        CheckpointError: values that transformers or the engine cannot accept, by name.
    """
    family = FAMILIES[model_type]
    _refuse_unsupported(values, family)
    try:
        kind = family.config_type or model_type
        config = CONFIG_MAPPING[kind].from_dict({**values, "model_type": kind})
        _check_sizes(config, family)
        rotary = hasattr(config, "rope_parameters")
        num_heads = getattr(config, family.heads)
        head_dim = _head_dim(config, num_heads)
        return ModelConfig(
            model_type=model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=getattr(config, family.layers),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, num_heads),
            head_dim=head_dim,
            max_position_embeddings=family.positions(config),
            attention_windows=family.windows(config),
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=getattr(config, "bos_token_id", None),
            pad_token_id=config.pad_token_id,
            rope=read_rope(config, head_dim) if rotary else None,
            encoder=None if family.encoder is None else family.encoder(config),
            family=MappingProxyType(config.to_dict()),
        )
    except CheckpointError:
        raise
    # transformers names the field and the value, but through any of these
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"config.json is no valid {model_type!r} config: {' '.join(str(error).split())}"
        ) from error


def _refuse_unsupported(values: dict[str, Any], family: Family) -> None:
    if values.get("quantization_config"):
        raise CheckpointError(
            f"quantization_config={values['quantization_config']!r} in config.json is not "
            "supported: the engine reads checkpoints in float16, bfloat16, float32 or float64"
        )
    stated = {name: values.get(name) for name in ("add_cross_attention", "is_encoder_decoder")}
    refused: dict[str, object] = {name: True for name in stated}
    if family.encoder is not None:
        refused = {"is_encoder_decoder": False}
    for name, value in refused.items():
        if stated[name] is value:
            kind = "decoder-only" if family.encoder is None else "encoder-decoder"
            raise CheckpointError(
                f"{name}={value} in config.json is not supported: the engine reads this family as "
                f"{kind} checkpoints"
            )


def _check_sizes(config: Any, family: Family) -> None:
    names = ["vocab_size", "hidden_size", family.layers, family.heads]
    if family.encoder is not None:
        names += ["num_hidden_layers", "num_attention_heads"]
    sizes = {name: getattr(config, name) for name in names}
    sizes["max_position_embeddings"] = family.positions(config)
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {name}={value!r} must be an integer, 1 or more")


def _head_dim(config: Any, heads: int) -> int:
    explicit: int | None = getattr(config, "head_dim", None)
    if explicit is not None:
        return explicit
    width = config.hidden_size
    if width % heads:
        raise CheckpointError(
            f"config.json: hidden size {width} is not a multiple of the {heads} attention heads"
        )
    return int(width // heads)


def _num_kv_heads(config: Any, heads: int) -> int:
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} attention heads are not a multiple of {kv_heads} key-value heads"
        )
    return kv_heads
