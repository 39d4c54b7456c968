"""``multiexit serve``: the model behind OpenAI's HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multiexit_engine import __version__
from multiexit_engine.async_engine import AsyncEngine
from multiexit_engine.cli.options import ENGINE, options_of_dataclass, with_options
from multiexit_engine.engine import Engine
from multiexit_engine.mode_forms import parse_decoding
from multiexit_engine.serve.settings import ServerSettings

INSTALL = "pip install 'multiexit-engine[serve]'"


@with_options(settings=options_of_dataclass(ServerSettings), engine=ENGINE)
def serve(
    settings: dict[str, Any],
    engine: dict[str, Any],
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo'.")] = "demo",
    decoding: Annotated[
        str | None,
        typer.Option(
            help="Mode of the requests that name none, the model's own way by default; see `info`."
        ),
    ] = None,
) -> None:
    """Serve MODEL with OpenAI's API, until SIGTERM or SIGINT."""
    try:
        from multiexit_engine.serve.app import create_app
        from multiexit_engine.serve.logs import log_as_json
        from multiexit_engine.serve.server import run
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs the package {error.name!r}: {INSTALL}") from error
    wanted = ServerSettings(**settings)
    log_as_json()
    mode = None if decoding is None else parse_decoding(decoding)
    loaded = Engine.from_pretrained(model, decoding=mode, **engine)
    async_engine = AsyncEngine(loaded, max_requests=wanted.max_requests)
    app = create_app(async_engine, wanted, _name(model), __version__)
    raise typer.Exit(run(app, async_engine, wanted))


def _name(model: str) -> str:
    """What clients call the model: of a folder its last part, not where it lies."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model
