"""Which exits a model has by its config, and which mode a request asks for in its extra arguments.

Knows nothing of vLLM but the shape of what it hands over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from multiexit_engine.checkpoint.exits import parse_layer_indices
from multiexit_engine.checkpoint.families import read_model_config
from multiexit_engine.config import ModelConfig, VocabularyProjectionMode
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.mode_forms import decoding_from_json, parse_decoding
from multiexit_engine.modes import Contrast, DecodingMode, Exit, Original

OfferedMode: TypeAlias = Original | Exit | Contrast


def read_exits(model_type: str, values: dict[str, Any]) -> ModelConfig:
    """The model's shape with the exits that its config.json states.

    Args:
        model_type: the family.
        values: content of config.json.

    Raises:
        ValueError: it states none, or what it states cannot be.
    """
    config = read_model_config(model_type, values)
    layers, projection = values.get("lm_head_layer_indices"), values.get("vocab_projection_mode")
    if not layers or projection is None:
        raise ValueError(
            "config.json states no exits; name them by hf_overrides, such as "
            '{"lm_head_layer_indices": [4, 8], '
            '"vocab_projection_mode": "SHARED_PROJECTION_CAST_OUTPUTS"}'
        )
    return replace(
        config,
        exit_layers=parse_layer_indices(layers, config.num_layers),
        projection=VocabularyProjectionMode.parse(projection),
    )


def requested_mode(arguments: Mapping[str, Any] | None) -> OfferedMode:
    """The mode under ``decoding`` in a request's extra arguments; Original where there is none.

    Args:
        arguments: ``SamplingParams.extra_args``; the mode as JSON or as on the command line.

    Raises:
        ValueError: it is no mode, or one that needs more than vLLM's model runner gives.
    """
    value = (arguments or {}).get("decoding")
    if value is None:
        return Original()
    mode: DecodingMode = (
        parse_decoding(value) if isinstance(value, str) else decoding_from_json(value)
    )
    if not isinstance(mode, OfferedMode):
        raise ValueError(f"decoding={value!r}: inside vLLM there are original, exit and contrast")
    return mode


def check_mode(mode: OfferedMode, config: ModelConfig) -> None:
    """Raise ValueError, naming the exits there are, where the model lacks one of the mode's."""
    resolve_mode(mode, config)
