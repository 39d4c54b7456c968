"""``multiexit generate``: continue prompts, as text or as JSON."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from multiexit_engine.cli.app import USER_ERROR, console, show_error
from multiexit_engine.cli.options import ENGINE, SAMPLING, with_options
from multiexit_engine.engine import Engine
from multiexit_engine.errors import RequestFailed
from multiexit_engine.outputs import RequestOutput
from multiexit_engine.params import DecodingMode, SamplingParams, parse_decoding

Model = Annotated[str, typer.Option(help="A local folder, a hub id, or 'demo'.")]
Decoding = Annotated[
    str,
    typer.Option(
        help="original, exit:LAYER, contrast:UPPER,LOWER[,alpha=0.1] or dola:LAYERS; see `info`."
    ),
]


@with_options(sampling=SAMPLING, engine=ENGINE)
def generate(
    sampling: dict[str, Any],
    engine: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    input: Annotated[
        str | None, typer.Option(help="File with one prompt on each line; - for standard input.")
    ] = None,
    model: Model = "demo",
    decoding: Decoding = "original",
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each prompt.")] = False,
) -> None:
    """Continue PROMPT, or every line of a file or of standard input."""
    params, mode = SamplingParams(**sampling), parse_decoding(decoding)
    prompts = read_prompts(prompt, input)
    loaded = Engine.from_pretrained(model, **engine)
    if not json and len(prompts) == 1 and params.n == params.num_beams == 1:
        _stream(loaded, prompts[0], params, mode)
        return
    outputs = loaded.generate(prompts, params, mode)
    for output in outputs:
        if json:
            typer.echo(_json(output))
        else:
            _show(output, with_heading=len(outputs) > 1)
    if any(output.error for output in outputs):
        raise typer.Exit(USER_ERROR)


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompts of the command line; raises ValueError when there is none, or two sources."""
    if prompt is not None and file is not None:
        raise ValueError(f"PROMPT and --input {file}: give one of them")
    if prompt is not None:
        return [prompt]
    if file is None and sys.stdin.isatty():
        raise ValueError("no prompt: give PROMPT, --input FILE, or text on standard input")
    text = sys.stdin.read() if file in (None, "-") else Path(str(file)).read_text("utf-8")
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file or 'standard input'} has no prompt: every line is one")
    return prompts


def _stream(engine: Engine, prompt: str, params: SamplingParams, mode: DecodingMode) -> None:
    """The text as it comes; on a terminal the prompt stands before it."""
    if console.is_terminal:
        console.print(f"[dim]{escape(prompt)}[/]", end="", soft_wrap=True)
    for chunk in engine.stream(prompt, params, mode):
        # not through rich, which would change tabs and control characters
        typer.echo(chunk.text, nl=False)
    typer.echo()


def _show(output: RequestOutput, *, with_heading: bool) -> None:
    if with_heading:
        console.print(f"[bold]{escape(output.prompt or '')}[/]", soft_wrap=True)
    if output.error is not None:
        show_error(RequestFailed(output.error))
        return
    for completion in output.outputs:
        label = f"[{completion.index}] " if len(output.outputs) > 1 else ""
        typer.echo(label + completion.text)


def _json(output: RequestOutput) -> str:
    return json_format.dumps(dataclasses.asdict(output), ensure_ascii=False)
