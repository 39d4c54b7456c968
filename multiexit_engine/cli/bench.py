"""``multiexit bench``: tokens per second of the decoding modes on this machine."""

from __future__ import annotations

import dataclasses
import json as json_format
from typing import Annotated, Any

import typer
from rich.table import Table

from multiexit_engine.cli.app import console
from multiexit_engine.cli.demo import demo_modes
from multiexit_engine.cli.generate import Model
from multiexit_engine.cli.options import ENGINE, Choice, options_of_function, with_options
from multiexit_engine.engine import Engine
from multiexit_engine.evaluate.speed import measure_latency, measure_throughput
from multiexit_engine.params import DecodingMode, Original, parse_decoding

bench = typer.Typer(name="bench", help="Measure the speed of decoding modes.", no_args_is_help=True)

_LATENCY: dict[str, Choice] = options_of_function(measure_latency)
_THROUGHPUT: dict[str, Choice] = options_of_function(measure_throughput, without=("batch_size",))
Modes = Annotated[
    list[str] | None,
    typer.Option("--decoding", help="A mode to measure; default: one of each kind."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object for each line.")]


@bench.command()
@with_options(measure=_LATENCY, engine=ENGINE)
def latency(
    measure: dict[str, Any],
    engine: dict[str, Any],
    model: Model = "demo",
    modes: Modes = None,
    json: Json = False,
) -> None:
    """One request at a time: milliseconds to the first token and for each later one."""
    loaded = Engine.from_pretrained(model, **engine)
    rows = []
    for name, mode in _chosen(loaded, modes).items():
        found = measure_latency(loaded, mode, **measure)
        rows.append(
            {
                "decoding": name,
                **dataclasses.asdict(found),
                "tokens_per_second": found.tokens_per_second,
            }
        )
    _show(rows, json)


@bench.command()
@with_options(measure=_THROUGHPUT, engine=ENGINE)
def throughput(
    measure: dict[str, Any],
    engine: dict[str, Any],
    model: Model = "demo",
    modes: Modes = None,
    batch_sizes: Annotated[str, typer.Option(help="Requests at once, as 1,8,32.")] = "1,8,32",
    json: Json = False,
) -> None:
    """Many requests at once: new tokens per second of all of them together."""
    sizes = [int(size) for size in batch_sizes.split(",")]
    loaded = Engine.from_pretrained(model, **engine)
    rows = [
        {
            "decoding": name,
            **dataclasses.asdict(measure_throughput(loaded, mode, batch_size=size, **measure)),
        }
        for name, mode in _chosen(loaded, modes).items()
        for size in sizes
    ]
    _show(rows, json)


def _chosen(engine: Engine, modes: list[str] | None) -> dict[str, DecodingMode]:
    if modes:
        return {name: parse_decoding(name) for name in modes}
    config = engine.model_config
    has_exits = any(layer < config.num_layers for layer in config.exit_layers)
    return demo_modes(config) if has_exits else {"original head": Original()}


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            typer.echo(json_format.dumps(row))
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "decoding" else "right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
