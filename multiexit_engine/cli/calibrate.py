"""``multiexit calibrate``: a threshold of early exits that keeps a share of the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multiexit_engine.checkpoint.calibration import write_calibration
from multiexit_engine.cli.app import console
from multiexit_engine.cli.options import ENGINE, options_of_function, with_options
from multiexit_engine.engine import Engine
from multiexit_engine.evaluate.calibration import calibrate as find_threshold

_SEARCH = options_of_function(find_threshold)


@with_options(search=_SEARCH, engine=ENGINE)
def calibrate(
    search: dict[str, Any],
    engine: dict[str, Any],
    model: Annotated[str, typer.Argument(help='A folder, a hub id, or "demo".')],
    texts: Annotated[
        list[Path], typer.Option(help="A text file that is new to the model; several times.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the result; default: the model's own.")
    ] = None,
) -> None:
    """Find the threshold of EarlyExit that keeps a share of full depth's tokens, and save it."""
    loaded = Engine.from_pretrained(model, **engine)
    read = [path.read_text("utf-8") for path in texts]
    found = find_threshold(loaded, read, **search)
    path = write_calibration(output or loaded.checkpoint.folder, found)
    console.print(
        f"threshold {found.threshold:.4g} of {found.measure}: {found.found_agreement:.1%} of "
        f"{found.num_tokens} tokens in {found.num_windows} windows were those of full depth, which "
        f"were left at layer {found.mean_layer:.1f} of {loaded.model_config.num_layers} on average"
    )
    console.print(f"written to {path}", soft_wrap=True)
