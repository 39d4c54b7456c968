"""``multiexit train``: make multi-exit models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from multiexit_engine.cli.app import console, error_console
from multiexit_engine.cli.options import (
    ENGINE,
    options_of_dataclass,
    options_of_function,
    with_options,
)
from multiexit_engine.engine import Engine
from multiexit_engine.train import (
    CausalTrainingConfig,
    ElmerProgress,
    ElmerReport,
    ElmerTrainingConfig,
    GateReport,
    HeadTrainingConfig,
    ProbeReport,
    TrainingProgress,
    TrainingReport,
    train_causal,
    train_elmer,
    train_exit_heads,
    train_gates,
    train_probes,
)

train = typer.Typer(name="train", help="Train models with exits.", no_args_is_help=True)


@train.command()
@with_options(config=options_of_dataclass(CausalTrainingConfig))
def causal(config: dict[str, Any]) -> None:
    """Train a small GPT-2 with exits from nothing, on a folder or archive of texts."""
    wanted = CausalTrainingConfig(**config)
    with _progress() as progress:
        task = progress.add_task("reading", total=1.0)

        def show(state: TrainingProgress) -> None:
            loss = state.losses[max(state.losses)]
            text = f"step {state.step}, {state.tokens_per_second:.0f} tokens/s, loss {loss:.3f}"
            progress.update(task, completed=state.share_done, description=text)

        report = train_causal(wanted, show)
    console.print(_table(report))
    typer.echo(f"written to {wanted.output}")


@train.command()
@with_options(config=options_of_dataclass(ElmerTrainingConfig))
def elmer(config: dict[str, Any]) -> None:
    """Train a small ELMER, which writes all tokens at once, from nothing, on pairs of texts."""
    wanted = ElmerTrainingConfig(**config)
    with _progress() as progress:
        task = progress.add_task("reading", total=1.0)

        def show(state: ElmerProgress) -> None:
            part = "pre-training" if state.part == "pre-training" else "fine-tuning"
            text = (
                f"{part}, step {state.step}, {state.tokens_per_second:.0f} tokens/s, "
                f"loss {state.loss:.3f}"
            )
            progress.update(task, completed=state.share_done, description=text)

        report = train_elmer(wanted, show)
    console.print(_text_table(report))
    typer.echo(f"written to {wanted.output}")


@train.command()
@with_options(config=options_of_dataclass(HeadTrainingConfig))
def heads(config: dict[str, Any]) -> None:
    """Train exit heads for a finished model, which itself stays as it is."""
    wanted = HeadTrainingConfig(**config)
    handler = RichHandler(console=error_console, show_path=False, show_level=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    last = train_exit_heads(wanted)[-1]
    losses = ", ".join(f"exit {layer}: {loss:.3f}" for layer, loss in sorted(last.items()))
    console.print(f"losses of the last step: {losses}")
    typer.echo(f"written to {wanted.output}")


@train.command()
@with_options(training=options_of_function(train_probes), engine=ENGINE)
def probes(
    training: dict[str, Any],
    engine: dict[str, Any],
    model: Annotated[str, typer.Argument(help='A folder, a hub id, or "demo".')],
    texts: Annotated[
        list[Path], typer.Option(help="A text file that is new to the model; several times.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the result; default: the model's own.")
    ] = None,
) -> None:
    """Train what tells EarlyExit, at every exit, whether its token is that of full depth."""
    loaded = Engine.from_pretrained(model, **engine)
    read = [path.read_text("utf-8") for path in texts]
    console.print(_probe_table(train_probes(loaded, read, output, **training)))
    typer.echo(f"written to {output or loaded.checkpoint.folder}")


@train.command()
@with_options(training=options_of_function(train_gates), engine=ENGINE)
def gates(
    training: dict[str, Any],
    engine: dict[str, Any],
    model: Annotated[str, typer.Argument(help='A folder, a hub id, or "demo-elmer".')],
    sources: Annotated[
        list[Path],
        typer.Option(help="Lines of a source each, as far as the first tab; several times."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the result; default: the model's own.")
    ] = None,
) -> None:
    """Train what tells an ELMER, after every layer, which positions are worth a test."""
    loaded = Engine.from_pretrained(model, **engine)
    lines = [line for path in sources for line in path.read_text("utf-8").splitlines()]
    texts = [text for line in lines if (text := line.split("\t")[0].strip())]
    console.print(_gate_table(train_gates(loaded, texts, output, **training)))
    typer.echo(f"written to {output or loaded.checkpoint.folder}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=error_console)


def _text_table(report: ElmerReport) -> Table:
    table = Table(title=f"{report.validation_pairs} held-out pairs after {report.steps} steps")
    table.add_column("exit")
    for name in ("BLEU", "ROUGE-L", "mean exit layer"):
        table.add_column(name, justify="right")
    table.add_row("copy of the source", f"{report.copy.bleu:.1f}", f"{report.copy.rouge_l:.1f}", "")
    for mode, figures in report.modes.items():
        numbers = (figures.bleu, figures.rouge_l, figures.mean_exit_layer)
        table.add_row(mode, *(f"{number:.1f}" for number in numbers))
    return table


def _probe_table(reports: list[ProbeReport]) -> Table:
    table = Table(title=f"figures of held-out windows after {reports[0].num_tokens} tokens")
    for name in ("exit", "agrees with the last layer", "ranking (0.5 is a guess)"):
        table.add_column(name, justify="right")
    for report in reports:
        table.add_row(str(report.layer), f"{report.agreement:.1%}", f"{report.ranking:.3f}")
    return table


def _gate_table(reports: list[GateReport]) -> Table:
    table = Table(title=f"figures of held-out sources after {reports[0].num_rows} positions")
    table.add_column("layer", justify="right")
    for name in ("variance explained", "pass where one in ten should"):
        for measure in ("max_prob", "entropy"):
            table.add_column(f"{name}, {measure}", justify="right")
    for report in reports:
        figures = (*report.explained, *report.one_in_ten)
        table.add_row(str(report.layer), *(f"{figure:.1%}" for figure in figures))
    return table


def _table(report: TrainingReport) -> Table:
    rows = [vars(figures) for figures in report.exits]
    table = Table(title=f"held-out figures after {report.steps} steps")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
