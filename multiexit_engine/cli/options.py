"""Command-line options made from dataclasses and signatures, so that no list exists twice.

A command declares a parameter for a group of options, say ``sampling``; on the command line stand
the group's fields, and the command gets a dictionary of those that were given.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from multiexit_engine.engine import Engine
from multiexit_engine.params import SamplingParams
from multiexit_engine.structured import StructuredOutputs, structured_outputs_from


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of a group.

    Attributes:
        annotation: the type typer parses.
        default: for the help text; MISSING for a required option.
        help: one sentence.
        convert: makes the field's value of what typer parsed.
    """

    annotation: Any
    default: Any
    help: str
    convert: Callable[[Any], Any]


def options_of_dataclass(cls: type, *, without: tuple[str, ...] = ()) -> dict[str, Choice]:
    """An option for every field of a dataclass, described by its docstring."""
    hints, texts = get_type_hints(cls), _described(cls.__doc__ or "")
    return {
        f.name: _choice(hints[f.name], f.default, texts.get(f.name, ""))
        for f in fields(cls)
        if f.name not in without
    }


def options_of_function(
    function: Callable[..., Any], *, without: tuple[str, ...] = ()
) -> dict[str, Choice]:
    """An option for every keyword-only parameter of a function."""
    hints, texts = get_type_hints(function), _described(function.__doc__ or "")
    return {
        name: _choice(hints[name], parameter.default, texts.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        and name not in without
        # a parameter that only takes None has nothing to choose
        and hints[name] is not types.NoneType
    }


def with_options(
    **groups: Mapping[str, Choice],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces the command's parameters of these names by the options of each group."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        kept = [parameter for name, parameter in own.items() if name not in groups]
        added = [
            _parameter(name, choice)
            for options in groups.values()
            for name, choice in options.items()
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            collected = {
                group: {
                    name: _converted(name, options[name], value)
                    for name in options
                    if (value := given.pop(name)) is not None and value != []
                }
                for group, options in groups.items()
            }
            command(**given, **collected)

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*kept, *added)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _converted(name: str, choice: Choice, value: Any) -> Any:
    try:
        return choice.convert(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from error


def _parameter(name: str, choice: Choice) -> inspect.Parameter:
    required = choice.default is MISSING
    has_default = not required and choice.default not in (None, ())
    default = f" (default {_as_typed(choice.default)})" if has_default else ""
    info = typer.Option(... if required else None, help=choice.help + default, show_default=False)
    annotation = choice.annotation if required else choice.annotation | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation
    )


def _as_typed(default: Any) -> str:
    """A default as it would be written on the command line."""
    if isinstance(default, Enum):
        return default.name.lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _choice(hint: Any, default: Any, text: str) -> Choice:
    if default is inspect.Parameter.empty:
        default = MISSING
    annotation, convert, form = _parsing(hint)
    return Choice(annotation, default, text + form, convert)


def _parsing(hint: Any) -> tuple[Any, Callable[[Any], Any], str]:
    """For a field's type: what typer parses, what makes the value of it, and how it is written."""
    kinds = _alternatives(hint)
    origins = [get_origin(kind) or kind for kind in kinds]
    if len(kinds) > 1 and bool in kinds:
        return str, _bool_or_word, ""
    for place, origin in enumerate(origins):
        if origin is tuple and set(get_args(kinds[place])) == {int, ...}:
            return str, _numbers, " Written 5,6."
        if origin is tuple:
            (item, *_) = get_args(kinds[place])
            return list[Path] if item is Path else list[str], tuple, " May be repeated."
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return list[str], _biases, " Written 5=-1.5; may be repeated."
        if isinstance(origin, type) and issubclass(origin, Enum):
            return str, functools.partial(_member, origin), ""
    if StructuredOutputs in kinds:
        return str, structured_outputs_from, " Written as JSON."
    for plain in (bool, Path, float, int):
        if plain in kinds:
            return plain, _same, ""
    return str, _same, ""


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, without None."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _alternatives(part)]
    if get_origin(hint) is Literal:
        return [type(value) for value in get_args(hint)]
    return [] if hint is types.NoneType else [hint]


def _same(value: Any) -> Any:
    return value


def _bool_or_word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _numbers(text: str) -> tuple[int, ...]:
    """``"10,8,6"`` or ``"10;8;6"``."""
    try:
        return tuple(int(part) for part in re.split("[,;]", text))
    except ValueError as error:
        raise ValueError("must be whole numbers, as 5,6") from error


def _biases(items: list[str]) -> dict[int, float]:
    """``["13=-5", "198=2.5"]``."""
    pairs = [item.partition("=") for item in items]
    try:
        return {int(token): float(bias) for token, _, bias in pairs}
    except ValueError as error:
        raise ValueError("must be a token id and a number, as 5=-1.5") from error


def _member(enum: type[Enum], text: str) -> Enum:
    names = enum.__members__
    if text.upper() not in names:
        raise ValueError(f"allowed are {', '.join(names)}")
    return names[text.upper()]


def _described(docstring: str) -> dict[str, str]:
    """The descriptions under ``Attributes:`` or ``Args:`` of a docstring, by name."""
    section = re.search(r"^ *(?:Attributes|Args):\n(.*?)(?:\n\n|\Z)", docstring, re.M | re.S)
    if section is None:
        return {}
    lines = inspect.cleandoc("\n" + section[1])
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", lines, re.M)
    return {name: " ".join(text.split()) for name, text in entries}


SAMPLING = options_of_dataclass(SamplingParams)
# a request's own seed, in SamplingParams, decides; the mode is given as --decoding
ENGINE = options_of_function(Engine.from_pretrained, without=("seed", "decoding"))
