"""Decoding modes: which heads one request takes its tokens from. Plain data, with a JSON form.

Values are checked here as far as they can be without a model; what a model allows is checked by
``decoding.plan``. Knows nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from multiexit_engine.checks import is_finite, is_int, reject

if TYPE_CHECKING:
    from torch import Tensor

Layer: TypeAlias = int | Literal["original"]


@dataclass(frozen=True, slots=True)
class Original:
    """The model's own head on its last layer. Exact: plain decoding."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The head of one exit; deeper layers are not run. Exact: the checkpoint's exit.

    Attributes:
        layer: 1-based layer of the exit.
    """

    layer: int

    def __post_init__(self) -> None:
        if not is_int(self.layer) or self.layer < 1:
            raise reject("Exit.layer", self.layer, "a layer number, 1 or more")


@dataclass(frozen=True, slots=True)
class Contrast:
    """Auto-contrastive decoding: an upper exit corrected by what a lower one expects.

    Among the plausible tokens (``p_upper >= alpha * max p_upper``) mass is shared in proportion to
    ``p_upper / p_lower``; all other tokens keep ``p_upper``. Exact up to rounding, computed in
    float32 log space, never NaN.

    Attributes:
        upper: 1-based exit layer, or "original" for the model's own head.
        lower: 1-based exit layer. Equal to ``upper`` it makes the plausible tokens equally likely.
        alpha: plausibility threshold relative to the most likely token; 1 and more keeps only that
            token (and ties), 0 and less all tokens.
        min_candidates: the plausible set has at least this many tokens.
        function: replaces the formula: takes float32 logits of the upper and of the lower exit,
            both ``[1, 1, vocab]``, returns scores of that shape; called once for every position.
            It costs both heads in full; alpha and min_candidates are then its own affair.

    Source: Gera et al. 2023, arXiv:2305.01628; IBM's ``calculate_contrasted_logits``.
    """

    upper: Layer
    lower: int
    alpha: float = 0.1
    min_candidates: int = 1
    function: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.upper != "original" and (not is_int(self.upper) or self.upper < 1):
            raise reject("Contrast.upper", self.upper, "a layer number, 1 or more, or 'original'")
        if not is_int(self.lower) or self.lower < 1:
            raise reject("Contrast.lower", self.lower, "a layer number, 1 or more")
        if not is_finite(self.alpha):
            raise reject("Contrast.alpha", self.alpha, "a finite number, usually in (0, 1]")
        if not is_int(self.min_candidates) or self.min_candidates < 0:
            raise reject("Contrast.min_candidates", self.min_candidates, "0 (all tokens) or more")
        if self.function is not None and not callable(self.function):
            raise reject("Contrast.function", self.function, "callable or None")


DecodingMode: TypeAlias = Original | Exit | Contrast
MODES: dict[str, type[Original] | type[Exit] | type[Contrast]] = {
    "original": Original,
    "exit": Exit,
    "contrast": Contrast,
}


def decoding_to_json(mode: DecodingMode) -> dict[str, Any]:
    """The JSON form of a mode: ``{"mode": "contrast", "upper": 24, "lower": 12, ...}``.

    Raises:
        ValueError: the mode holds a Python function.
    """
    name = next(name for name, cls in MODES.items() if isinstance(mode, cls))
    values = {f.name: getattr(mode, f.name) for f in fields(mode)}
    if values.pop("function", None) is not None:
        raise ValueError("Contrast.function: a Python function has no JSON form")
    return {"mode": name, **values}


def decoding_from_json(value: Mapping[str, Any]) -> DecodingMode:
    """The mode of a JSON form; raises ValueError naming any unknown or missing field."""
    if not isinstance(value, Mapping):
        raise reject("decoding", value, 'an object such as {"mode": "exit", "layer": 6}')
    name = value.get("mode")
    if not isinstance(name, str) or name not in MODES:
        raise reject("decoding.mode", name, "one of " + ", ".join(map(repr, MODES)))
    cls = MODES[name]
    known = {f.name: f for f in fields(cls) if f.name != "function"}
    given = {key: item for key, item in value.items() if key != "mode"}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"decoding mode {name!r} has no field {unknown[0]!r}: {_listed(known)}")
    required = {key for key, item in known.items() if item.default is MISSING}
    if missing := sorted(required - given.keys()):
        raise ValueError(f"decoding mode {name!r} needs the field {missing[0]!r}: {_listed(known)}")
    return cls(**given)


def parse_decoding(text: str) -> DecodingMode:
    """The mode of a command-line form such as ``contrast:24,12,alpha=0.1`` or ``exit:6``.

    Values without a name fill the fields in order. Raises ValueError as ``decoding_from_json``.
    """
    name, _, rest = text.strip().partition(":")
    if name not in MODES:
        raise reject("decoding", text, "one of " + ", ".join(f"{mode}:..." for mode in MODES))
    names = [f.name for f in fields(MODES[name]) if f.name != "function"]
    value: dict[str, Any] = {"mode": name}
    for place, part in enumerate(part.strip() for part in rest.split(",") if part.strip()):
        key, equals, number = part.partition("=")
        if not equals:
            if place >= len(names):
                raise ValueError(f"decoding={text!r}: mode {name!r}: {_listed(names)}")
            key, number = names[place], part
        if (key := key.strip()) in value:
            raise ValueError(f"decoding={text!r}: {key!r} is given twice")
        value[key] = _number_or_word(number.strip())
    return decoding_from_json(value)


def _number_or_word(text: str) -> int | float | str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, int | float) else text


def _listed(names: Mapping[str, object] | list[str]) -> str:
    return "its fields are " + ", ".join(names) if names else "it has no fields"
