"""``multiexit bench exits``: what thresholds of early exits gain and lose, table and plot."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from multiexit_engine.cli.app import console
from multiexit_engine.cli.generate import Model
from multiexit_engine.cli.options import ENGINE, Choice, options_of_function, with_options
from multiexit_engine.engine import Engine
from multiexit_engine.evaluate.exit_frontier import FrontierPoint, measure_frontier

_SWEEP: dict[str, Choice] = options_of_function(measure_frontier, without=("thresholds",))


@with_options(sweep=_SWEEP, engine=ENGINE)
def exits(
    sweep: dict[str, Any],
    engine: dict[str, Any],
    text: Annotated[Path, typer.Option(help="A text file that is new to the model.")],
    model: Model = "demo",
    thresholds: Annotated[
        str | None, typer.Option(help="Thresholds to measure, as 0.9,0.7,0.5.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Where to draw frontier and exit depths, as exits.png.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each line.")] = False,
) -> None:
    """Early exits by threshold: agreement with full depth, perplexity, depth and speed."""
    if thresholds is not None:
        sweep["thresholds"] = tuple(float(word) for word in thresholds.split(","))
    loaded = Engine.from_pretrained(model, **engine)
    points = measure_frontier(loaded, text.read_text("utf-8"), **sweep)
    if plot is not None:
        draw(points, plot)
    if not json:
        console.print(_table(points))
        return
    for point in points:
        typer.echo(json_format.dumps(dataclasses.asdict(point)))


def _table(points: list[FrontierPoint]) -> Table:
    table = Table()
    layers = sorted({layer for point in points for layer in point.shares})
    headings = ["threshold", "agreement", "perplexity", "mean layer", "tokens/s", "speedup"]
    for heading in [*headings, *(f"exit {layer}" for layer in layers)]:
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(
            f"{point.threshold:g}",
            f"{point.agreement:.1%}",
            f"{point.perplexity:.2f}",
            f"{point.mean_layer:.2f}",
            f"{point.tokens_per_second:.0f}",
            f"{point.speedup:.2f}x",
            *(f"{point.shares.get(layer, 0):.0%}" for layer in layers),
        )
    return table


def draw(points: list[FrontierPoint], path: Path) -> None:
    """Plot speed against agreement, and how many tokens left at each layer.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    frontier, depths = figure.subplots(1, 2)
    frontier.plot([100 * p.agreement for p in points], [p.speedup for p in points], "o-")
    for point in points:
        place = 100 * point.agreement, point.speedup
        frontier.annotate(f"{point.threshold:g}", place, (3, 3), textcoords="offset points")
    frontier.axhline(1, color="grey", linewidth=0.8)
    frontier.set(xlabel="tokens equal to full depth's, %", ylabel="speed, full depth = 1")
    names = [f"{point.threshold:g}" for point in points]
    floor = [0.0] * len(points)
    for layer in sorted({layer for point in points for layer in point.shares}):
        shares = [100 * point.shares.get(layer, 0.0) for point in points]
        depths.bar(names, shares, bottom=floor, label=f"layer {layer}")
        floor = [low + share for low, share in zip(floor, shares, strict=True)]
    depths.set(xlabel="threshold", ylabel="tokens that left there, %")
    depths.legend()
    figure.savefig(path, dpi=110)
