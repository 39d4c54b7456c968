"""Tokens per second at batch 1 beside what people use today, all ways in turn on the same weights.

python benchmarks/latency.py --peers all --peer-python vllm=vllm/bin/python --json latency.json

``roster.py`` says how the peers are installed; those that are not are named and left out. Prints
each way with the floor that its bytes set, whether float32 peers gave the same tokens, and the
project's bars.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import typer
from agreement import describe, gaps_where_they_part
from bars import BAR_COLUMNS, latency_bars
from bytes_read import has_codes, mean_context, step_bytes
from checkpoints import KEPT_CHECKPOINTS, Shape, make_checkpoint
from comparison import (
    BackendName,
    CheckpointFolder,
    Job,
    JsonFile,
    Measured,
    PeerNames,
    PeerPythons,
    Setting,
    ShapeNames,
    WeightKinds,
    chosen_setting,
    measure_shapes,
    random_job,
)
from report import median, show
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


def modes(shape: Shape) -> dict[str, DecodingMode]:
    """What the engine is measured in."""
    return {
        "Original": Original(),
        "Contrast": Contrast(shape.upper, shape.lower),
        "Exit": Exit(shape.lower),
    }


def bytes_of(way: Way, job: Job, backend: str) -> float:
    """Bytes that one of the way's decode steps must read."""
    layers = job.shape.lower if way.mode == "exit" else job.shape.upper
    context = mean_context(len(job.prompts[0]), job.new_tokens)
    by_codes = way.name.startswith("engine") and has_codes(job.shape, way.weights, backend)
    return step_bytes(job.shape, layers, way.weights, context, by_codes=by_codes)


def engine_ways(job: Job, weights: str, engine: Engine) -> list[Way]:
    """Every mode, and the prompt's own step alone: what is left is decoding."""
    ways = [
        engine_way(engine, name, weights, mode, job.prompts, job.new_tokens)
        for name, mode in modes(job.shape).items()
    ]
    return [*ways, engine_way(engine, "first token", weights, Original(), job.prompts, 1)]


def figures(ways: list[Way], job: Job, backend: str, read: float) -> list[dict[str, Any]]:
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
            row["step_bytes"] = bytes_of(way, job, backend)
            row["floor_tokens_per_s"] = read / row["step_bytes"]
        rows.append(row)
    return rows


def step_shares(ways: list[Way], job: Job, backend: str, read: float) -> dict[str, float]:
    """Share of ``read`` that a whole decode step of Original reaches, by weights."""
    found = {(way.name, way.weights): way for way in ways}
    shares = {}
    for (name, weights), way in found.items():
        if name == "engine Original":
            first = median(found["engine first token", weights].seconds)
            step = (median(way.seconds) - first) / (job.new_tokens - 1)
            shares[weights] = bytes_of(way, job, backend) / step / read
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
            mode = modes(job.shape)[own.name.removeprefix("engine ")]
            gaps = gaps_where_they_part(engines["float32"], mode, job.prompts, own, way)
        found[way.name, way.weights] = describe(own, way, gaps)
    return found


ENGINE_REFERENCES = ("engine Original", "engine Contrast")


def run_shape(job: Job, setting: Setting) -> Measured:
    """Measure one model size; prints its tables."""
    shape = job.shape
    checkpoint = make_checkpoint(shape, setting.folder, torch.float32)
    with ExitStack() as running:
        started = start_peers(setting.peers, setting.pythons, shape, checkpoint, setting.weights, 1)
        for _, _, process in started:
            running.enter_context(process)
        engines = {
            kind: load_engine(checkpoint, shape, kind, setting.backend, 1)
            for kind in setting.weights
        }
        reading, read_bytes = plain_read_way()
        ways = [way for kind in setting.weights for way in engine_ways(job, kind, engines[kind])]
        stolen = stolen_seconds([p for _, _, p in started], lambda: [way.turn() for way in ways])
        ways += [
            peer_way(peer, process, kind, job.prompts, job.new_tokens)
            for peer, kind, process in started
        ]
        measure([reading, *ways], job.rounds)
        same = agreements(ways, job, engines)
    read = read_bytes / median(reading.seconds)
    rows = figures(ways, job, setting.backend, read)
    for row in rows:
        row["tokens_agree"] = same.get((row["way"], row["weights"]), "")
    shares = step_shares(ways, job, setting.backend, read)
    rates = {(way.name, way.weights): way.rate for way in ways}
    floors = {(way.name, way.weights): read / bytes_of(way, job, setting.backend) for way in ways}
    bars = latency_bars(rates, floors, shares)
    lengths = f"{len(job.prompts[0])} + {job.new_tokens} tokens"
    title = (
        f"{shape.name}, batch 1, {lengths}, {torch.get_num_threads()} threads, {setting.backend}"
    )
    print(f"plain read {read / 1e9:.1f} GB/s; stopped peers used {stolen:.2f} s of CPU")
    columns = ["way", "weights", "tokens/s", "ms/token", "floor tokens/s", "tokens"]
    show(title, columns, [_cells(row) for row in rows])
    show(f"{shape.name}, bars", BAR_COLUMNS, [bar.cells() for bar in bars])
    for row in rows:
        row |= {"read_gb_per_s": read / 1e9}
        if row["way"] == "engine Original":
            row["share_of_read"] = shares[row["weights"]]
    versions = {peer.title: process.version for peer, _, process in started}
    return Measured(rows, bars, versions)


def _cells(row: dict[str, Any]) -> list[str]:
    floor = f"{row['floor_tokens_per_s']:.1f}" if "floor_tokens_per_s" in row else ""
    numbers = [f"{row['tokens_per_s']:.1f}", f"{row['ms_per_token']:.2f}", floor]
    return [row["way"], row["weights"], *numbers, row["tokens_agree"]]


def main(
    shape: ShapeNames = None,
    weights: WeightKinds = None,
    peers: PeerNames = "transformers,ibm",
    peer_python: PeerPythons = None,
    prompt_len: int = 32,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    backend: BackendName = "auto",
    folder: CheckpointFolder = KEPT_CHECKPOINTS,
    json: JsonFile = None,
) -> None:
    """Measure batch-1 decoding of random-weight models."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = chosen_setting(weights, backend, peers, peer_python, folder)

    def measure_shape(name: str) -> Measured:
        return run_shape(random_job(name, 1, prompt_len, new_tokens, rounds), chosen)

    measure_shapes(shape, backend, json, measure_shape)


if __name__ == "__main__":
    typer.run(main)
