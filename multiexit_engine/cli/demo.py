"""``multiexit demo``: one prompt, continued by several modes side by side."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from multiexit_engine.cli.app import console
from multiexit_engine.cli.generate import Model
from multiexit_engine.cli.options import ENGINE, with_options
from multiexit_engine.config import ModelConfig
from multiexit_engine.engine import Engine
from multiexit_engine.evaluate.diversity import measure_diversity
from multiexit_engine.params import Contrast, DecodingMode, Exit, Original, SamplingParams

PROMPT = "The old house stood at the end of the lane, and"


@with_options(engine=ENGINE)
def demo(
    engine: dict[str, Any],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = PROMPT,
    model: Model = "demo",
    max_new_tokens: Annotated[int, typer.Option(help="Length of each continuation.")] = 80,
) -> None:
    """Continue one prompt by the original head, by a middle exit and by their contrast."""
    loaded = Engine.from_pretrained(model, **engine)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    modes = demo_modes(loaded.model_config)
    # the first request of a mode pays for reading its heads
    loaded.generate([prompt] * len(modes), SamplingParams(max_new_tokens=2), list(modes.values()))
    console.print(Text(prompt, style="bold"))
    panels = [_panel(loaded, name, prompt, params, mode) for name, mode in modes.items()]
    beside = Table.grid(expand=True)
    for _ in panels:
        beside.add_column(ratio=1)
    beside.add_row(*panels)
    console.print(beside)


def demo_modes(config: ModelConfig) -> dict[str, DecodingMode]:
    """Three modes that show what exits are for; raises ValueError for a model without exits."""
    lower = [layer for layer in config.exit_layers if layer < config.num_layers]
    if not lower:
        raise ValueError(
            "this model has no exit below its last layer; give "
            "--vocab-projection-mode shared_projection_direct to make one of every layer"
        )
    middle = lower[len(lower) // 2]
    return {
        "original head": Original(),
        f"exit {middle} of {config.num_layers}": Exit(middle),
        f"contrast original, {middle}": Contrast("original", middle),
    }


def _panel(
    engine: Engine, name: str, prompt: str, params: SamplingParams, mode: DecodingMode
) -> Panel:
    start = time.perf_counter()
    completion = engine.generate(prompt, params, mode)[0].outputs[0]
    rate = len(completion.token_ids) / (time.perf_counter() - start)
    repetition = measure_diversity(completion.text).repetition[3]
    figures = f"{rate:.0f} tokens/s"
    if repetition is not None:
        figures += f", {repetition:.0f} % repeated 3-grams"
    return Panel(Group(Text(completion.text), Text("\n" + figures, style="dim")), title=name)
