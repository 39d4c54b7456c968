"""What all commands share: the program itself, its consoles, and how errors are shown.

Knows no command.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from multiexit_engine import __version__
from multiexit_engine.errors import EngineError

USER_ERROR = 2

console = Console(highlight=False, emoji=False)
error_console = Console(stderr=True, highlight=False, emoji=False)


class _OneLineErrors(TyperGroup):
    """Shows what the user did wrong as one line, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # the reader of the output, say `head`, has had enough: no mistake
            raise
        except (EngineError, ValueError, OSError) as error:
            if ctx.params["traceback"]:
                raise
            show_error(error)
            raise typer.Exit(USER_ERROR) from error


app = typer.Typer(
    name="multiexit",
    cls=_OneLineErrors,
    help="Language models with exits: generate, score, look, measure, train.",
    no_args_is_help=True,
    add_completion=False,
)


def show_error(error: object) -> None:
    """One line on standard error."""
    error_console.print("error:", style="bold red", end=" ")
    error_console.print(" ".join(str(error).split()), markup=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"multiexit-engine {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    traceback: Annotated[bool, typer.Option(help="Show where an error was raised.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass
