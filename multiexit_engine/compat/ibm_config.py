"""IBM's MultiExitConfiguration: which exits generate, in that library's own words.

Knows the names of the engine's decoding modes, and nothing of models or tensors but the contrast
formula.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.ops.contrast import contrast_logits
from multiexit_engine.params import Contrast, DecodingMode, Exit, Layer, Original

ContrastFunction = Callable[[Tensor, Tensor], Tensor]


def calculate_contrasted_logits(
    upper_layer_logits: Tensor,
    lower_layer_logits: Tensor,
    minimum_candidates: int = 1,
    alpha: float = 0.1,
) -> Tensor:
    """Log-probabilities of auto-contrastive decoding, ``[..., vocab]`` in float32.

    Among the candidates (``p_upper >= min(alpha * max p_upper, minimum_candidates-th p_upper)``)
    mass is shared in proportion to ``p_upper / p_lower``; other tokens keep ``p_upper``.

    Computed in float32 log space: unlike the original it gives no NaN for half precision or where
    a probability underflows.

    Source: ``calculate_contrasted_logits`` of autocontrastive-gen; arXiv:2305.01628.
    """
    vocab_size = upper_layer_logits.shape[-1]
    if not 0 <= minimum_candidates <= vocab_size:
        raise ValueError(f"minimum_candidates={minimum_candidates}: must be in 0..{vocab_size}")
    shapes = upper_layer_logits.shape, lower_layer_logits.shape
    shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    upper, lower = upper_layer_logits.expand(shape), lower_layer_logits.expand(shape)
    rows = upper.numel() // vocab_size
    contrasted: Tensor = contrast_logits(
        upper.reshape(rows, vocab_size),
        lower.reshape(rows, vocab_size),
        torch.full((rows,), alpha, dtype=torch.float32, device=upper.device),
        torch.full((rows,), minimum_candidates, device=upper.device),
    )
    return contrasted.view(shape)


@dataclass
class MultiExitConfiguration:
    """Which exits of a model generate, and how; IBM's fields, defaults and string forms.

    Attributes:
        vocab_projection_mode: how an exit's hidden state becomes logits, or the mode's name.
        lm_head_layer_indices: exits to load, ``(24, 12)`` or ``"24;12"``; None as in the
            checkpoint's config. Needed for a checkpoint that lists no exits.
        freeze_parameters: concerns training only; this engine never changes a loaded model.
        use_original_head: decode with the model's own head and no exit.
        output_layer_index: decode with this exit.
        contrast_layer_indices: decode with the contrast of (upper, lower), as tuple or
            ``"original;12"``; goes before output_layer_index.
        contrast_function: ``f(upper_logits, lower_logits) -> scores``. A
            ``partial(calculate_contrasted_logits, alpha=..., minimum_candidates=...)`` runs at the
            engine's full speed; any other function costs two full heads.
    """

    vocab_projection_mode: VocabularyProjectionMode | str = (
        VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION
    )
    lm_head_layer_indices: tuple[int, ...] | str | None = None
    freeze_parameters: bool | str = False
    use_original_head: bool | str = True
    output_layer_index: int | str | None = None
    contrast_layer_indices: tuple[Layer, int] | str | None = None
    contrast_function: ContrastFunction = partial(
        calculate_contrasted_logits, minimum_candidates=1, alpha=0.1
    )

    def __post_init__(self) -> None:
        self.vocab_projection_mode = VocabularyProjectionMode.parse(self.vocab_projection_mode)
        self.use_original_head = _truth("use_original_head", self.use_original_head)
        self.freeze_parameters = _truth("freeze_parameters", self.freeze_parameters)
        if self.lm_head_layer_indices is not None:
            layers = _layers("lm_head_layer_indices", self.lm_head_layer_indices)
            if "original" in layers:
                raise ValueError(
                    f"lm_head_layer_indices={self.lm_head_layer_indices!r}: must be layer "
                    f"numbers; the original head is always there"
                )
            self.lm_head_layer_indices = tuple(int(layer) for layer in layers)
        if self.output_layer_index is not None:
            self.output_layer_index = _number("output_layer_index", self.output_layer_index)
        if self.contrast_layer_indices is not None:
            self.contrast_layer_indices = _pair(self.contrast_layer_indices)
            if self.use_original_head:
                raise ValueError(
                    f"contrast_layer_indices={self.contrast_layer_indices!r} contradicts "
                    f"use_original_head=True (its default); give use_original_head=False"
                )
        if not callable(self.contrast_function):
            raise ValueError(f"contrast_function={self.contrast_function!r}: must be callable")

    def get_description(self) -> str:
        """A short name of what generates: ``original_head``, ``24_vs_12`` or ``layer_12``."""
        if self.use_original_head:
            return "original_head"
        if self.contrast_layer_indices:
            return f"{self.contrast_layer_indices[0]}_vs_{self.contrast_layer_indices[1]}"
        return f"layer_{self.output_layer_index}"

    @property
    def decoding(self) -> DecodingMode:
        """The engine's decoding mode; raises ValueError when no exit was chosen."""
        if self.use_original_head:
            return Original()
        if self.contrast_layer_indices is not None:
            upper, lower = _pair(self.contrast_layer_indices)
            return Contrast(upper, lower, **_contrast_fields(self.contrast_function))
        if self.output_layer_index is None:
            raise ValueError(
                "use_original_head=False: give output_layer_index or contrast_layer_indices, "
                "the exits that shall generate"
            )
        return Exit(int(self.output_layer_index))


def _contrast_fields(function: ContrastFunction) -> dict[str, Any]:
    """Fields of Contrast for a contrast function: numbers where it is IBM's own."""
    names = {"alpha": "alpha", "minimum_candidates": "min_candidates"}
    if function is calculate_contrasted_logits:
        return {}
    if (
        isinstance(function, partial)
        and function.func is calculate_contrasted_logits
        and not function.args
        and function.keywords.keys() <= names.keys()
    ):
        return {names[key]: value for key, value in function.keywords.items()}
    return {"function": function}


def _truth(name: str, value: object) -> bool:
    if isinstance(value, str) and value in ("True", "False"):
        value = ast.literal_eval(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False, or 'True' or 'False'")
    return value


def _number(name: str, value: object) -> int:
    try:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        return int(value)
    except ValueError:
        raise ValueError(f"{name}={value!r}: must be a layer number") from None


def _layers(name: str, value: object) -> list[Layer]:
    """Layers of a tuple, a list, or a string such as ``"original;12"``."""
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, tuple | list) or not parts:
        raise ValueError(f"{name}={value!r}: must be a tuple such as (24, 12), or '24;12'")
    return ["original" if part == "original" else _number(name, part) for part in parts]


def _pair(value: object) -> tuple[Layer, int]:
    layers = _layers("contrast_layer_indices", value)
    if len(layers) != 2 or layers[1] == "original":
        raise ValueError(
            f"contrast_layer_indices={value!r}: must be (upper, lower), the upper a layer number "
            f"or 'original', the lower a layer number"
        )
    return layers[0], layers[1]
