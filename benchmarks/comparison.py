"""What scripts share that measure model sizes beside peers: options, jobs, and their report.

Knows no way of decoding and no bar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from bars import Bar
from checkpoints import SHAPES, Shape
from report import write_json
from roster import Peer, chosen_peers, peer_pythons

ShapeNames = Annotated[list[str] | None, typer.Option(help="of " + ", ".join(SHAPES))]
WeightKinds = Annotated[
    list[str] | None, typer.Option(help="float32, bfloat16, int8, int4; the first two if none")
]
PeerNames = Annotated[str, typer.Option(help="names with commas, all, or none")]
PeerPythons = Annotated[
    list[str] | None, typer.Option(help="NAME=PATH: the Python that has that peer")
]
BackendName = Annotated[str, typer.Option(help="of the engine: auto, reference or native")]
CheckpointFolder = Annotated[Path, typer.Option(help="where checkpoints are kept")]
JsonFile = Annotated[Path | None, typer.Option(help="write the figures here")]


@dataclass(frozen=True)
class Job:
    """What the requests are, and how often all of them run."""

    shape: Shape
    prompts: list[list[int]]
    new_tokens: int
    rounds: int


@dataclass(frozen=True)
class Setting:
    """What every model size is measured with.

    Attributes:
        weights: kinds of weights; each way runs with those that it has.
        backend: of the engine.
        peers: what runs beside it.
        pythons: the interpreters of peers that have one of their own.
        folder: where checkpoints are kept.
    """

    weights: list[str]
    backend: str
    peers: list[Peer]
    pythons: dict[str, str]
    folder: Path


class Measured(NamedTuple):
    """What one model size gave: a row of figures for each way, bars, and the peers' versions."""

    rows: list[dict[str, Any]]
    bars: list[Bar]
    versions: dict[str, str]


def chosen_setting(
    weights: list[str] | None,
    backend: str,
    peers: str,
    pythons: list[str] | None,
    folder: Path,
) -> Setting:
    """The setting that options name."""
    kinds = weights or ["float32", "bfloat16"]
    return Setting(kinds, backend, chosen_peers(peers), peer_pythons(pythons or []), folder)


def random_job(shape: str, num_prompts: int, prompt_len: int, new_tokens: int, rounds: int) -> Job:
    """Requests with random prompts for a model size."""
    vocab_size = SHAPES[shape].config.vocab_size
    prompts = torch.randint(0, vocab_size, (num_prompts, prompt_len)).tolist()
    return Job(SHAPES[shape], prompts, new_tokens, rounds)


def measure_shapes(
    shapes: list[str] | None,
    backend: str,
    json: Path | None,
    measure_shape: Callable[[str], Measured],
) -> None:
    """Measure model sizes one after the other and write all figures after each."""
    results: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for name in shapes or ["gpt2-medium", "gpt-neo-125m"]:
        measured = measure_shape(name)
        results += measured.rows
        versions |= measured.versions
        bars += [{"shape": name} | bar.as_row() for bar in measured.bars]
        write_json(json, results, bars=bars, peers=versions, backend=backend)
