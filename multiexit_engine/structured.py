"""What form a text must have: JSON, one of some strings, a regular expression or a grammar.

Plain data; ``multiexit_engine.grammar`` makes something to decode with of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from multiexit_engine.checks import reject

MAX_CHOICES = 10_000


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """The form of a text: exactly one of the fields says it. Names as in vLLM.

    Attributes:
        json: a JSON schema that the text follows, as a dict or as JSON text.
        json_object: the text is any JSON object.
        regex: a regular expression that the whole text matches, in the syntax of Rust's regex.
        choice: the text is one of these strings.
        grammar: a context-free grammar of the text: Lark as llguidance reads it, or GBNF.

    JSON is written without whitespace between its parts: a small model that may write whitespace
    can go on writing it.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: {' and '.join(given) or 'nothing'} given; give one of "
                + ", ".join(names)
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        if not isinstance(self.json_object, bool):
            raise reject("structured_outputs.json_object", self.json_object, "True or False")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise reject(f"structured_outputs.{name}", getattr(self, name), "a string")


def structured_outputs_from(value: Mapping[str, Any] | str) -> StructuredOutputs:
    """Read ``{"regex": "[ab]+"}``, as a mapping or as JSON text.

    Raises:
        ValueError: it is neither, or a field is unknown or wrong.
    """
    if isinstance(value, str):
        value = _read_json("structured_outputs", value)
    if not isinstance(value, Mapping):
        raise reject("structured_outputs", value, "an object such as {'regex': '[ab]+'}")
    names = [field.name for field in fields(StructuredOutputs)]
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ValueError(
            f"structured_outputs has no field {unknown[0]!r}: its fields are {', '.join(names)}"
        )
    return StructuredOutputs(**value)


def _schema_text(schema: Mapping[str, Any] | str) -> str:
    """A schema as text, which can be a key of a table."""
    if isinstance(schema, str):
        schema = _read_json("structured_outputs.json", schema)
    if not isinstance(schema, Mapping):
        raise reject("structured_outputs.json", schema, "a JSON schema that is an object")
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"structured_outputs.json: the schema cannot be written as JSON: {error}"
        ) from error


def _choices(choice: object) -> tuple[str, ...]:
    allowed = f"1 to {MAX_CHOICES} non-empty strings"
    if isinstance(choice, str) or not isinstance(choice, Sequence):
        raise reject("structured_outputs.choice", choice, allowed)
    if not 1 <= len(choice) <= MAX_CHOICES:
        raise ValueError(f"structured_outputs.choice has {len(choice)} items: must be {allowed}")
    for text in choice:
        if not isinstance(text, str) or not text:
            raise reject("structured_outputs.choice", text, allowed)
    return tuple(choice)


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the text is not JSON: {error}") from error
