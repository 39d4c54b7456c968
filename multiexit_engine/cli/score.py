"""``multiexit score``: what a text costs each decoding mode."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from multiexit_engine.cli.app import console
from multiexit_engine.cli.generate import Model
from multiexit_engine.cli.options import ENGINE, with_options
from multiexit_engine.engine import Engine
from multiexit_engine.evaluate.perplexity import Perplexity, measure_perplexity
from multiexit_engine.params import parse_decoding


@with_options(engine=ENGINE)
def score(
    engine: dict[str, Any],
    file: Annotated[str, typer.Argument(help="Text file; - for standard input.")],
    model: Model = "demo",
    decoding: Annotated[
        list[str] | None, typer.Option(help="A mode to measure; may be given several times.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens that each further window scores; default: as many as fit."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each mode.")] = False,
) -> None:
    """Perplexity of a text under one or several decoding modes."""
    modes = {name: parse_decoding(name) for name in decoding or ["original"]}
    text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    loaded = Engine.from_pretrained(model, **engine)
    results = {name: measure_perplexity(loaded, text, mode, stride) for name, mode in modes.items()}
    if not json:
        console.print(_table(results))
        return
    for name, result in results.items():
        values = {"decoding": name, **_figures(result), **dataclasses.asdict(result)}
        typer.echo(json_format.dumps(values))


def _figures(result: Perplexity) -> dict[str, float]:
    return {
        "perplexity_per_token": result.per_token,
        "perplexity_per_word": result.per_word,
        "bits_per_byte": result.bits_per_byte,
    }


def _table(results: dict[str, Perplexity]) -> Table:
    table = Table("decoding", caption="perplexity per token and per word")
    for heading in ("per token", "per word", "bits/byte", "top-1", "tokens"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.per_token:.2f}",
            f"{result.per_word:.2f}",
            f"{result.bits_per_byte:.3f}",
            f"{result.greedy_accuracy:.1%}",
            str(result.num_tokens),
        )
    return table
