"""Tokens per second of many requests at once, beside peers that batch, all in turn.

python benchmarks/throughput.py --peers all --peer-python vllm=vllm/bin/python --json out.json
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
import typer
from agreement import describe
from bars import BAR_COLUMNS, throughput_bars
from checkpoints import KEPT_CHECKPOINTS, make_checkpoint
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
from report import show
from ways import Way, engine_way, load_engine, measure, peer_way, start_peers

from multiexit_engine import Contrast, DecodingMode, Engine, Exit, Original


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
        *([way("Original, 8 together", Original(), prompts[:8])] if count > 8 else []),
        way("Original, one", Original(), prompts[:1]),
    ]


def run_shape(job: Job, setting: Setting) -> Measured:
    """Measure one model size; prints its tables."""
    shape, count = job.shape, len(job.prompts)
    checkpoint = make_checkpoint(shape, setting.folder, torch.float32)
    chosen = [peer for peer in setting.peers if peer.batches]
    with ExitStack() as running:
        started = start_peers(chosen, setting.pythons, shape, checkpoint, setting.weights, count)
        for _, _, process in started:
            running.enter_context(process)
        ways = []
        for kind in setting.weights:
            engine = load_engine(checkpoint, shape, kind, setting.backend, count)
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
    threads = torch.get_num_threads()
    title = f"{shape.name}, {count} requests, {length}, {threads} threads, {setting.backend}"
    cells = [
        [way.name, way.weights, f"{way.rate:.1f}", str(row["tokens_agree"])]
        for way, row in zip(ways, rows, strict=True)
    ]
    show(title, ["way", "weights", "tokens/s", "tokens"], cells)
    show(f"{shape.name}, bars", BAR_COLUMNS, [bar.cells() for bar in bars])
    versions = {peer.title: process.version for peer, _, process in started}
    return Measured(rows, bars, versions)


def _is_reference(way: Way, count: int) -> bool:
    return way.name in (f"engine Original, {count} together", f"engine Contrast, {count} together")


def main(
    shape: ShapeNames = None,
    weights: WeightKinds = None,
    peers: PeerNames = "transformers,ibm",
    peer_python: PeerPythons = None,
    requests: int = 16,
    prompt_len: int = 32,
    new_tokens: int = 32,
    rounds: int = 3,
    threads: int = 2,
    backend: BackendName = "auto",
    folder: CheckpointFolder = KEPT_CHECKPOINTS,
    json: JsonFile = None,
) -> None:
    """Measure the throughput of concurrent requests on random-weight models."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = chosen_setting(weights, backend, peers, peer_python, folder)

    def measure_shape(name: str) -> Measured:
        return run_shape(random_job(name, requests, prompt_len, new_tokens, rounds), chosen)

    measure_shapes(shape, backend, json, measure_shape)


if __name__ == "__main__":
    typer.run(main)
