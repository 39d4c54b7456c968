"""Tokens per second at batch 1 beside what people use today, all ways in turn on the same weights.

python benchmarks/latency.py --peers all --peer-python vllm=vllm/bin/python --json latency.json

``roster.py`` says how the peers are installed; those that are not are named and left out. Prints
each way with the floor that its bytes set, whether float32 peers gave the same tokens, and the
project's bars.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from agreement import describe, gaps_where_they_part
from bars import BAR_COLUMNS, Bar, latency_bars
from bytes_read import mean_context, step_bytes
from checkpoints import KEPT_CHECKPOINTS, SHAPES, Shape, make_checkpoint
from report import median, show, write_json
from roster import chosen_peers, peer_pythons
from ways import (
    Way,
    engine_way,
    load_engine,
    measure,
    peer_way,
    plain_read_way,
    start_peers,
    stolen_seconds,
)

from multiexit_engine import Contrast, DecodingMode, Engine, Exit, Original


@dataclass(frozen=True)
class Job:
    """What one request is, and how often it runs."""

    shape: Shape
    prompt: list[int]
    new_tokens: int
    rounds: int

    def modes(self) -> dict[str, DecodingMode]:
        return {
            "Original": Original(),
            "Contrast": Contrast(self.shape.upper, self.shape.lower),
            "Exit": Exit(self.shape.lower),
        }

    def bytes_of(self, way: Way) -> float:
        """Bytes that one of the way's decode steps must read."""
        layers = self.shape.lower if way.mode == "exit" else self.shape.upper
        context = mean_context(len(self.prompt), self.new_tokens)
        return step_bytes(self.shape, layers, way.weights, context)


def engine_ways(job: Job, weights: str, engine: Engine) -> list[Way]:
    """Every mode, and the prompt's own step alone: what is left is decoding."""
    prompts = [job.prompt]
    ways = [
        engine_way(engine, name, weights, mode, prompts, job.new_tokens)
        for name, mode in job.modes().items()
    ]
    return [*ways, engine_way(engine, "first token", weights, Original(), prompts, 1)]


def figures(ways: list[Way], job: Job, read: float) -> list[dict[str, Any]]:
    """A row for each way; ``read`` is the measured speed of a plain read in bytes per second."""
    rows = []
    for way in ways:
        row: dict[str, Any] = {
            "shape": job.shape.name,
            "way": way.name,
            "weights": way.weights,
            "tokens_per_s": way.rate,
            "ms_per_token": 1000 / way.rate,
            "seconds": way.seconds,
        }
        if way.num_tokens > 1:
            row["step_bytes"] = job.bytes_of(way)
            row["floor_tokens_per_s"] = read / job.bytes_of(way)
        rows.append(row)
    return rows


def step_shares(ways: list[Way], job: Job, read: float) -> dict[str, float]:
    """Share of ``read`` that a whole decode step of Original reaches, by weights."""
    found = {(way.name, way.weights): way for way in ways}
    shares = {}
    for (name, weights), way in found.items():
        if name == "engine Original":
            first = median(found["engine first token", weights].seconds)
            step = (median(way.seconds) - first) / (job.new_tokens - 1)
            shares[weights] = job.bytes_of(way) / step / read
    return shares


def agreements(ways: list[Way], job: Job, engines: dict[str, Engine]) -> dict[tuple[str, str], str]:
    """What each peer's tokens say, beside the engine's of the same weights and mode."""
    ours = {(way.mode, way.weights): way for way in ways if way.name in ENGINE_REFERENCES}
    found = {}
    for way in ways:
        own = ours.get((way.mode, way.weights))
        if own is None or way.name.startswith("engine"):
            continue
        gaps = {}
        if way.weights == "float32":
            mode = job.modes()[own.name.removeprefix("engine ")]
            gaps = gaps_where_they_part(engines["float32"], mode, [job.prompt], own, way)
        found[way.name, way.weights] = describe(own, way, gaps)
    return found


ENGINE_REFERENCES = ("engine Original", "engine Contrast")


def run_shape(
    job: Job,
    weights: list[str],
    backend: str,
    peers: str,
    pythons: dict[str, str],
    folder: Path,
) -> tuple[list[dict[str, Any]], list[Bar], dict[str, str]]:
    """Measure one model size; prints its tables."""
    shape = job.shape
    checkpoint = make_checkpoint(shape, folder, torch.float32)
    with ExitStack() as running:
        started = start_peers(chosen_peers(peers), pythons, shape, checkpoint, weights, 1)
        for _, _, process in started:
            running.enter_context(process)
        engines = {kind: load_engine(checkpoint, shape, kind, backend, 1) for kind in weights}
        reading, read_bytes = plain_read_way()
        ways = [way for kind in weights for way in engine_ways(job, kind, engines[kind])]
        stolen = stolen_seconds([p for _, _, p in started], lambda: [way.turn() for way in ways])
        ways += [
            peer_way(peer, process, kind, [job.prompt], job.new_tokens)
            for peer, kind, process in started
        ]
        measure([reading, *ways], job.rounds)
        same = agreements(ways, job, engines)
    read = read_bytes / median(reading.seconds)
    rows = figures(ways, job, read)
    for row in rows:
        row["tokens_agree"] = same.get((row["way"], row["weights"]), "")
    shares = step_shares(ways, job, read)
    rates = {(way.name, way.weights): way.rate for way in ways}
    floors = {(way.name, way.weights): read / job.bytes_of(way) for way in ways}
    bars = latency_bars(rates, floors, shares)
    lengths = f"{len(job.prompt)} + {job.new_tokens} tokens"
    title = f"{shape.name}, batch 1, {lengths}, {torch.get_num_threads()} threads, {backend}"
    print(f"plain read {read / 1e9:.1f} GB/s; stopped peers used {stolen:.2f} s of CPU")
    columns = ["way", "weights", "tokens/s", "ms/token", "floor tokens/s", "tokens"]
    show(title, columns, [_cells(row) for row in rows])
    show(f"{shape.name}, bars", BAR_COLUMNS, [bar.cells() for bar in bars])
    for row in rows:
        row |= {"read_gb_per_s": read / 1e9}
        if row["way"] == "engine Original":
            row["share_of_read"] = shares[row["weights"]]
    return rows, bars, {peer.title: process.version for peer, _, process in started}


def _cells(row: dict[str, Any]) -> list[str]:
    floor = f"{row['floor_tokens_per_s']:.1f}" if "floor_tokens_per_s" in row else ""
    numbers = [f"{row['tokens_per_s']:.1f}", f"{row['ms_per_token']:.2f}", floor]
    return [row["way"], row["weights"], *numbers, row["tokens_agree"]]


def main(
    shape: Annotated[list[str] | None, typer.Option(help="of " + ", ".join(SHAPES))] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, int8, int4; the first two if none")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="names with commas, all, or none")
    ] = "transformers,ibm",
    peer_python: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: the Python that has that peer")
    ] = None,
    prompt_len: int = 32,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    backend: Annotated[str, typer.Option(help="of the engine: auto, reference or native")] = "auto",
    folder: Annotated[Path, typer.Option(help="where checkpoints are kept")] = KEPT_CHECKPOINTS,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure batch-1 decoding of random-weight models."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results, bars, versions = [], [], {}
    for name in shape or ["gpt2-medium", "gpt-neo-125m"]:
        prompt = torch.randint(0, SHAPES[name].config.vocab_size, (prompt_len,)).tolist()
        job = Job(SHAPES[name], prompt, new_tokens, rounds)
        kinds = weights or ["float32", "bfloat16"]
        pythons = peer_pythons(peer_python or [])
        rows, met, found = run_shape(job, kinds, backend, peers, pythons, folder)
        results += rows
        versions |= found
        bars += [{"shape": name} | bar.as_row() for bar in met]
        command = shlex.join(["python", *sys.argv])
        write_json(json, command, results, bars=bars, peers=versions, backend=backend)


if __name__ == "__main__":
    typer.run(main)
