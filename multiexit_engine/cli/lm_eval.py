"""``multiexit lm-eval``: lm-evaluation-harness's own command line, which then knows our model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

INSTALL = "pip install 'multiexit-engine[lm-eval]'"


def lm_eval(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="lm-eval's own, such as --model_args pretrained=demo --tasks piqa."),
    ] = None,
) -> None:
    """Run lm-evaluation-harness; --model is multiexit unless given."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import multiexit_engine.compat.lm_eval  # noqa: F401  its import registers the model
    except ModuleNotFoundError as error:
        raise ValueError(f"lm-eval needs the package {error.name!r}: {INSTALL}") from error
    sys.argv = ["lm_eval", *_with_model(arguments or [])]
    cli_evaluate()


def _with_model(arguments: list[str]) -> list[str]:
    """The arguments of a run, which name a model; those of other subcommands as they are."""
    if not arguments or arguments[0] in ("ls", "validate", "-h", "--help"):
        return arguments
    if arguments[0] != "run":
        arguments = ["run", *arguments]
    names_one = any(a in ("--model", "-M") or a.startswith("--model=") for a in arguments)
    return arguments if names_one else [*arguments, "--model", "multiexit"]
