"""How decoding modes are written: as JSON, and on the command line.

Knows their fields; what they mean is ``modes``' own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args

from multiexit_engine.checks import reject
from multiexit_engine.modes import MODES, DecodingMode


def decoding_to_json(mode: DecodingMode) -> dict[str, Any]:
    """The JSON form of a mode: ``{"mode": "contrast", "upper": 24, "lower": 12, ...}``.

    Raises:
        ValueError: the mode holds a Python function.
    """
    name = next(name for name, cls in MODES.items() if isinstance(mode, cls))
    values = {f.name: _to_json(getattr(mode, f.name)) for f in fields(mode)}
    if values.pop("function", None) is not None:
        raise ValueError("Contrast.function: a Python function has no JSON form")
    return {"mode": name} | {
        key: list(item) if isinstance(item, tuple) else item for key, item in values.items()
    }


def _to_json(value: Any) -> Any:
    if isinstance(value, get_args(DecodingMode)):
        return decoding_to_json(value)
    return list(value) if isinstance(value, tuple) else value


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
    if isinstance(target := given.get("target"), Mapping):
        given["target"] = decoding_from_json(target)
    return cls(**given)


def parse_decoding(text: str) -> DecodingMode:
    """The mode of a command-line form such as ``contrast:24,12,alpha=0.1`` or ``dola:2;4;6``.

    Values without a name fill the fields in order; semicolons make a list. The fields of a mode
    inside a mode stand in parentheses: ``self_speculative:6,target=contrast(24,12)``. Raises
    ValueError as ``decoding_from_json``.
    """
    return decoding_from_json(_parsed(text, text))


def _parsed(form: str, text: str) -> dict[str, Any]:
    name, _, rest = form.strip().partition(":")
    if name not in MODES:
        raise reject("decoding", text, "one of " + ", ".join(f"{mode}:..." for mode in MODES))
    names = [f.name for f in fields(MODES[name]) if f.name != "function"]
    value: dict[str, Any] = {"mode": name}
    for place, part in enumerate(part for part in _parts(rest, text) if part):
        key, equals, word = part.partition("=")
        if not equals or "(" in key:
            if place >= len(names):
                raise ValueError(f"decoding={text!r}: mode {name!r}: {_listed(names)}")
            key, word = names[place], part
        if (key := key.strip()) in value:
            raise ValueError(f"decoding={text!r}: {key!r} is given twice")
        value[key] = _value(key, word.strip(), text)
    return value


def _parts(text: str, whole: str) -> list[str]:
    """The parts between commas that stand in no parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise ValueError(f"decoding={whole!r}: a parenthesis has no partner")
    return [part.strip() for part in parts]


def _value(key: str, word: str, text: str) -> Any:
    name, parenthesis, inside = word.removesuffix(")").partition("(")
    if key == "target":
        return _parsed(f"{name}:{inside}" if parenthesis else word, text)
    items = [_number_or_word(item.strip()) for item in word.split(";")]
    return items[0] if len(items) == 1 else items


def _number_or_word(text: str) -> int | float | str | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if value is None or isinstance(value, int | float) else text


def _listed(names: Mapping[str, object] | list[str]) -> str:
    return "its fields are " + ", ".join(names) if names else "it has no fields"
