"""Tokens per second of many requests at once, beside peers that batch, all in turn.

python benchmarks/throughput.py --peers all --peer-python vllm=vllm/bin/python --json out.json
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
from agreement import describe
from bars import BAR_COLUMNS, Bar, throughput_bars
from checkpoints import KEPT_CHECKPOINTS, SHAPES, Shape, make_checkpoint
from report import show, write_json
from roster import chosen_peers, peer_pythons
from ways import Way, engine_way, load_engine, measure, peer_way, start_peers

from multiexit_engine import Contrast, DecodingMode, Engine, Exit, Original


@dataclass(frozen=True)
class Job:
    """What the requests are, and how often all of them run."""

    shape: Shape
    prompts: list[list[int]]
    new_tokens: int
    rounds: int


def engine_ways(job: Job, weights: str, engine: Engine) -> list[Way]:
    """All requests in one mode, all in four modes, eight, and one alone."""
    shape, prompts = job.shape, job.prompts
    contrast = Contrast(shape.upper, shape.lower)
    mixed: list[DecodingMode] = [Original(), contrast, Exit(shape.upper), Exit(shape.lower)]
    modes = [mixed[i % len(mixed)] for i in range(len(prompts))]
    count = len(prompts)

    def way(name: str, mode: DecodingMode | list[DecodingMode], asked: list[list[int]]) -> Way:
        return engine_way(engine, name, weights, mode, asked, job.new_tokens)

    return [
        way(f"Original, {count} together", Original(), prompts),
        way(f"Contrast, {count} together", contrast, prompts),
        way(f"four modes, {count} together", modes, prompts),
        way("Original, 8 together", Original(), prompts[:8]),
        way("Original, one", Original(), prompts[:1]),
    ]


def run_shape(
    job: Job, weights: list[str], backend: str, peers: str, pythons: dict[str, str], folder: Path
) -> tuple[list[dict[str, Any]], list[Bar], dict[str, str]]:
    """Measure one model size; prints its tables."""
    shape, count = job.shape, len(job.prompts)
    checkpoint = make_checkpoint(shape, folder, torch.float32)
    chosen = [peer for peer in chosen_peers(peers) if peer.batches]
    with ExitStack() as running:
        started = start_peers(chosen, pythons, shape, checkpoint, weights, count)
        for _, _, process in started:
            running.enter_context(process)
        ways = []
        for kind in weights:
            engine = load_engine(checkpoint, shape, kind, backend, count)
            ways += engine_ways(job, kind, engine)
        ways += [
            peer_way(peer, process, kind, job.prompts, job.new_tokens)
            for peer, kind, process in started
        ]
        measure(ways, job.rounds)
    ours = {(way.mode, way.weights): way for way in reversed(ways) if _is_reference(way, count)}
    rows = [
        {
            "shape": shape.name,
            "way": way.name,
            "weights": way.weights,
            "tokens_per_s": way.rate,
            "seconds": way.seconds,
            "tokens_agree": ""
            if way.name.startswith("engine") or (way.mode, way.weights) not in ours
            else describe(ours[way.mode, way.weights], way, {}),
        }
        for way in ways
    ]
    bars = throughput_bars({(way.name, way.weights): way.rate for way in ways}, count)
    length = f"{len(job.prompts[0])} + {job.new_tokens} tokens"
    title = (
        f"{shape.name}, {count} requests, {length}, {torch.get_num_threads()} threads, {backend}"
    )
    cells = [
        [way.name, way.weights, f"{way.rate:.1f}", str(row["tokens_agree"])]
        for way, row in zip(ways, rows, strict=True)
    ]
    show(title, ["way", "weights", "tokens/s", "tokens"], cells)
    show(f"{shape.name}, bars", BAR_COLUMNS, [bar.cells() for bar in bars])
    return rows, bars, {peer.title: process.version for peer, _, process in started}


def _is_reference(way: Way, count: int) -> bool:
    return way.name in (f"engine Original, {count} together", f"engine Contrast, {count} together")


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
    requests: int = 16,
    prompt_len: int = 32,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int = 2,
    backend: Annotated[str, typer.Option(help="of the engine: auto, reference or native")] = "auto",
    folder: Annotated[Path, typer.Option(help="where checkpoints are kept")] = KEPT_CHECKPOINTS,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure the throughput of concurrent requests on random-weight models."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results, bars, versions = [], [], {}
    for name in shape or ["gpt2-medium", "gpt-neo-125m"]:
        vocab = SHAPES[name].config.vocab_size
        prompts = torch.randint(0, vocab, (requests, prompt_len)).tolist()
        job = Job(SHAPES[name], prompts, new_tokens, rounds)
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
