"""Which exits a checkpoint has and how they project, from its config, its keys and the caller.

Knows IBM's names of the extra tensors; nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from multiexit_engine.checkpoint.weights import Weights
from multiexit_engine.config import ModelConfig, VocabularyProjectionMode
from multiexit_engine.errors import CheckpointError

LAYER_SPECIFIC = VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION
CAST = VocabularyProjectionMode.SHARED_PROJECTION_CAST_OUTPUTS
DIRECT = VocabularyProjectionMode.SHARED_PROJECTION_DIRECT

LayerIndices: TypeAlias = Sequence[int] | str


def exit_weight_name(mode: VocabularyProjectionMode, layer: int, num_layers: int) -> str | None:
    """Name of the tensor that this exit has of its own; None when it needs none."""
    if mode is LAYER_SPECIFIC:
        return f"name_to_lm_exit_head.lm_head_{layer}.weight"
    if mode is CAST and layer < num_layers:
        return f"name_to_conv_matrix.{layer}_to_{num_layers}.weight"
    return None


def parse_layer_indices(value: LayerIndices, num_layers: int) -> tuple[int, ...]:
    """Ascending layers of ``"24;12"``, ``"24,12"`` or a sequence; ValueError says what is wrong."""
    allowed = f"layers from 1 to {num_layers}, such as (2, {num_layers}) or '2;{num_layers}'"
    items: Sequence[object] = re.split("[;,]", value) if isinstance(value, str) else tuple(value)
    layers: set[int] = set()
    for item in items:
        text = item.strip() if isinstance(item, str) else item
        if text == "original":
            raise ValueError(
                f"lm_head_layer_indices={value!r}: the model's own head is always there and is "
                f"not listed as 'original'; allowed are {allowed}"
            )
        layer = int(text) if isinstance(text, str) and text.isdecimal() else text
        if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer <= num_layers:
            raise ValueError(
                f"lm_head_layer_indices={value!r}: {item!r} is out of range; allowed are {allowed}"
            )
        layers.add(layer)
    if not layers:
        raise ValueError(f"lm_head_layer_indices={value!r}: allowed are {allowed}")
    return tuple(sorted(layers))


def resolve_exits(
    config: ModelConfig,
    stated: dict[str, Any],
    weights: Weights,
    layer_indices: LayerIndices | None,
    mode: VocabularyProjectionMode | None,
) -> tuple[tuple[int, ...], VocabularyProjectionMode | None]:
    """Exit layers, ascending, and their projection; ``((), None)`` for a single-exit checkpoint.

    Args:
        config: the model's shape.
        stated: content of config.json.
        weights: for the keys that are present.
        layer_indices: the caller's choice of layers, which wins over config.json.
        mode: the caller's choice of projection, which wins over config.json.

    Raises:
        ValueError: the caller's layers are out of range.
        CheckpointError: config.json's are, or the mode needs tensors that the checkpoint lacks.
    """
    present = {
        LAYER_SPECIFIC: _layers_of(weights, r"name_to_lm_exit_head\.lm_head_(\d+)\.weight"),
        CAST: _layers_of(weights, rf"name_to_conv_matrix\.(\d+)_to_{config.num_layers}\.weight"),
    }
    mode = mode or _stated_mode(stated) or next((m for m in present if present[m]), None)
    if layer_indices is not None:
        layers = parse_layer_indices(layer_indices, config.num_layers)
    else:
        layers = _stated_layers(stated, config.num_layers) or _implied_layers(
            mode, present, config.num_layers
        )
    if not layers:
        if mode in present:
            raise CheckpointError(_missing(mode, "any layer", present))
        return (), None
    mode = mode or DIRECT
    for layer in layers:
        name = exit_weight_name(mode, layer, config.num_layers)
        if name is not None:
            _check(weights, name, mode, layer, config, present)
    return layers, mode


def _layers_of(weights: Weights, pattern: str) -> tuple[int, ...]:
    matches = (re.fullmatch(pattern, name) for name in weights.names())
    return tuple(sorted(int(match[1]) for match in matches if match))


def _stated_mode(stated: dict[str, Any]) -> VocabularyProjectionMode | None:
    value = stated.get("vocab_projection_mode")
    if value is None:
        return None
    try:
        return VocabularyProjectionMode.parse(value)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _stated_layers(stated: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    value = stated.get("lm_head_layer_indices")
    if value is None or value == []:
        return ()
    if not isinstance(value, list | str):
        raise CheckpointError(
            f"config.json: lm_head_layer_indices={value!r} must be a list of layers or absent"
        )
    try:
        return parse_layer_indices(value, num_layers)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _implied_layers(
    mode: VocabularyProjectionMode | None,
    present: dict[VocabularyProjectionMode, tuple[int, ...]],
    num_layers: int,
) -> tuple[int, ...]:
    if mode is None:
        return ()
    if mode is DIRECT:
        return tuple(range(1, num_layers + 1))
    layers = present[mode]
    return (*layers, num_layers) if mode is CAST and layers else layers


def _check(
    weights: Weights,
    name: str,
    mode: VocabularyProjectionMode,
    layer: int,
    config: ModelConfig,
    present: dict[VocabularyProjectionMode, tuple[int, ...]],
) -> None:
    if name not in weights:
        raise CheckpointError(_missing(mode, f"layer {layer} ({name!r})", present))
    rows = config.vocab_size if mode is LAYER_SPECIFIC else config.hidden_size
    shape = [rows, config.hidden_size]
    if list(weights.get(name).shape) != shape:
        raise CheckpointError(
            f"tensor {name!r} has the shape {list(weights.get(name).shape)}, but config.json asks "
            f"for {shape}: the two files belong to different models"
        )


def _missing(
    mode: VocabularyProjectionMode,
    what: str,
    present: dict[VocabularyProjectionMode, tuple[int, ...]],
) -> str:
    working = [f"{m.name} for layers {list(layers)}" for m, layers in present.items() if layers]
    working.append(f"{DIRECT.name} for any layer")
    return f"the checkpoint has no {mode.name} weights for {what}; what would work: " + "; ".join(
        working
    )
