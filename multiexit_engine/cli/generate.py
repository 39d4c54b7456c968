"""``multiexit generate``: continue prompts, as text or as JSON."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from multiexit_engine.cli.app import USER_ERROR, console, error_console, show_error
from multiexit_engine.cli.exit_page import Section, exit_page
from multiexit_engine.cli.exit_view import Piece, coloured_legend, coloured_text, text_pieces
from multiexit_engine.cli.options import ENGINE, SAMPLING, with_options
from multiexit_engine.engine import Engine
from multiexit_engine.errors import RequestFailed
from multiexit_engine.outputs import CompletionOutput, RequestOutput
from multiexit_engine.params import DecodingMode, SamplingParams, parse_decoding
from multiexit_engine.serve.offline import generate_file

Model = Annotated[str, typer.Option(help="A local folder, a hub id, or 'demo'.")]
Decoding = Annotated[
    str | None,
    typer.Option(
        help="The model's own way by default; original, exit:LAYER, "
        "contrast:UPPER,LOWER[,alpha=0.1], dola:LAYERS or "
        "self_speculative:EXIT[,target=MODE(...)]; with ELMER's decoder parallel:EXIT; see `info`."
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
    output: Annotated[
        Path | None,
        typer.Option(
            help="Answer the JSON lines of --input here; goes on where a killed run stood."
        ),
    ] = None,
    model: Model = "demo",
    decoding: Decoding = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each prompt.")] = False,
    show_exits: Annotated[
        bool, typer.Option("--show-exits", help="Colour the text by the layer that chose it.")
    ] = False,
    exits_html: Annotated[
        Path | None, typer.Option(help="Write the text, coloured by exit layer, to this page.")
    ] = None,
) -> None:
    """Continue PROMPT, or every line of a file or of standard input."""
    if json and show_exits:
        raise ValueError("--json and --show-exits: give one of them")
    params = SamplingParams(**sampling)
    mode = None if decoding is None else parse_decoding(decoding)
    if output is not None:
        if input in (None, "-") or prompt is not None or json or show_exits or exits_html:
            raise ValueError("--output: goes with --input FILE, and without PROMPT or views")
        source = Path(str(input)).resolve(strict=True)
        _answer_file(Engine.from_pretrained(model, **engine), source, output, sampling, mode)
        return
    prompts = read_prompts(prompt, input)
    loaded = Engine.from_pretrained(model, **engine)
    coloured = show_exits or exits_html is not None
    if not json:
        params = dataclasses.replace(params, confidences=coloured)
    if not json and not coloured and len(prompts) == 1 and params.n == params.num_beams == 1:
        _stream(loaded, prompts[0], params, mode)
        return
    outputs = loaded.generate(prompts, params, mode)
    for result in outputs:
        if json:
            typer.echo(_json(result))
        elif show_exits:
            _show_exits(loaded, result)
        else:
            _show(result, with_heading=len(outputs) > 1)
    if exits_html is not None:
        title = model if decoding is None else f"{model}, {decoding}"
        exits_html.write_text(_exits_page(loaded, outputs, title), "utf-8")
    if any(result.error for result in outputs):
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


def _answer_file(
    engine: Engine, source: Path, target: Path, sampling: dict[str, Any], mode: DecodingMode | None
) -> None:
    report = generate_file(engine, source, target, sampling, mode)
    kept = f", {report.num_kept} were there before" if report.num_kept else ""
    error_console.print(f"{report.num_done} lines answered in {target}{kept}", soft_wrap=True)
    if report.num_failed:
        show_error(f"{report.num_failed} lines could not be run: see their field error")
        raise typer.Exit(USER_ERROR)


def _stream(engine: Engine, prompt: str, params: SamplingParams, mode: DecodingMode | None) -> None:
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


def _show_exits(engine: Engine, output: RequestOutput) -> None:
    if output.error is not None:
        show_error(RequestFailed(output.error))
        return
    num_layers = engine.model_config.num_layers
    for completion in output.outputs:
        pieces = _pieces(engine, output, completion)
        # an answer does not continue its source
        end = "" if engine.model_config.encoder is None else "\n"
        console.print(Text(output.prompt or "", "dim"), end=end, soft_wrap=True)
        console.print(coloured_text(pieces, num_layers), soft_wrap=True)
        console.print(coloured_legend(pieces, num_layers), soft_wrap=True)


def _exits_page(engine: Engine, outputs: list[RequestOutput], title: str) -> str:
    sections = [
        Section(output.prompt or "", _pieces(engine, output, completion))
        for output in outputs
        for completion in output.outputs
    ]
    return exit_page(sections, engine.model_config.num_layers, title)


def _pieces(engine: Engine, output: RequestOutput, completion: CompletionOutput) -> list[Piece]:
    return text_pieces(
        engine.tokenizer,
        output.prompt_token_ids,
        completion.token_ids,
        completion.exit_layers,
        text=completion.text,
    )


def _json(output: RequestOutput) -> str:
    return json_format.dumps(dataclasses.asdict(output), ensure_ascii=False)
