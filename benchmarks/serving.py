"""Servers under load: 16 clients, Poisson arrivals, and what HTTP costs over ``Engine.generate``.

python benchmarks/serving.py --peer-python vllm=vllm/bin/python --json out.json
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoints import KEPT_CHECKPOINTS, SHAPES
from http_clients import Figures, arriving, together
from http_servers import KINDS, OURS, HttpServer, python_for, servable, text_of
from report import median, show, write_json
from roster import peer_pythons

from multiexit_engine import Engine, SamplingParams

COLUMNS = ["server", "tokens/s", "TTFT p50", "p95", "ITL p50", "p95", "p99 (ms)"]


def bodies(prompts: Sequence[list[int]], new_tokens: int, is_ours: bool) -> list[dict[str, Any]]:
    """Greedy requests of one length."""
    more: dict[str, Any] = {"stream_options": {"include_usage": True}, "ignore_eos": True}
    return [
        {"prompt": text_of(prompt), "max_tokens": new_tokens, "temperature": 0.0}
        | (more if is_ours else {})
        for prompt in prompts
    ]


def measure_overhead(
    server: HttpServer, engine: Engine, prompts: list[list[int]], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """The same requests through HTTP, all streamed at once, and by ``Engine.generate``, in turn."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    asked = bodies(prompts, new_tokens, is_ours=True)
    texts = [text_of(prompt) for prompt in prompts]
    seconds: dict[str, list[float]] = {"http": [], "engine": []}
    for measured in [False] + [True] * rounds:
        with server.awake():
            started = time.perf_counter()
            asyncio.run(together(server.port, asked, len(asked)))
            http = time.perf_counter() - started
        started = time.perf_counter()
        engine.generate(texts, params, progress=False)
        alone = time.perf_counter() - started
        if measured:
            seconds["http"].append(http)
            seconds["engine"].append(alone)
    ratios = [h / e for h, e in zip(seconds["http"], seconds["engine"], strict=True)]
    return {"seconds": seconds, "ratio": median(ratios)}


def measure_server(
    server: HttpServer,
    prompts: list[list[int]],
    new_tokens: int,
    num_clients: int,
    rates: Sequence[float],
) -> dict[str, dict[str, Any]]:
    """Figures of one server under each load."""
    knows_usage = server.kind.peer != "transformers"
    asked = bodies(prompts, new_tokens, knows_usage)
    found = {}
    with server.awake():
        asyncio.run(together(server.port, asked[:2], 2))  # not measured
        streams = asyncio.run(together(server.port, asked, num_clients))
        found[f"{num_clients} clients"] = asdict(Figures.of(streams, new_tokens))
        for rate in rates:
            streams = asyncio.run(arriving(server.port, asked, rate))
            found[f"{rate:g} requests/s"] = asdict(Figures.of(streams, new_tokens))
    return found


def cells(title: str, figures: dict[str, Any]) -> list[str]:
    """A table's row."""
    ttft, itl = figures["ttft_s"], figures["itl_s"]
    numbers = [ttft["p50"], ttft["p95"], itl["p50"], itl["p95"], itl["p99"]]
    return [title, f"{figures['tokens_per_s']:.1f}", *(f"{s * 1e3:.0f}" for s in numbers)]


def main(
    shape: Annotated[str, typer.Option(help="of " + ", ".join(SHAPES))] = "gpt-neo-125m",
    weights: str = "float32",
    servers: Annotated[str, typer.Option(help="titles with ; or all")] = "all",
    peer_python: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: the Python that has that peer")
    ] = None,
    clients: int = 16,
    requests: int = 16,
    rate: Annotated[list[float] | None, typer.Option(help="arrivals per second")] = None,
    prompt_len: int = 32,
    new_tokens: int = 32,
    rounds: Annotated[int, typer.Option(help="of HTTP beside Engine.generate")] = 4,
    threads: int = 2,
    folder: Annotated[Path, typer.Option(help="where checkpoints are kept")] = KEPT_CHECKPOINTS,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure servers on one random-weight model, each alone on the machine."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = servable(SHAPES[shape], folder)
    prompts = torch.randint(0, SHAPES[shape].config.vocab_size, (requests, prompt_len)).tolist()
    pythons = peer_pythons(peer_python or [])
    kinds = [k for k in KINDS if servers == "all" or k.title in servers.split(";")]
    results: list[dict[str, Any]] = []
    overhead: dict[str, Any] = {}
    with ExitStack() as running:
        started = {}
        for kind in kinds:
            try:
                server = HttpServer(
                    kind, python_for(kind, pythons), model, weights, threads, clients
                )
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            started[kind.title] = running.enter_context(server)
        if OURS in started and rounds:
            engine = Engine.from_pretrained(
                model,
                device="cpu",
                dtype=weights,
                max_batch_size=clients,
                prefix_caching=False,
                kv_cache_memory=2**28,
            )
            overhead = measure_overhead(
                started[OURS], engine, prompts[:clients], new_tokens, rounds
            )
            del engine
            gc.collect()
        for title, server in started.items():
            found = measure_server(server, prompts, new_tokens, clients, rate or [2.0])
            results += [{"server": title, "load": load} | found[load] for load in found]
            write_json(json, results, overhead=overhead, shape=shape, weights=weights)
    for load in dict.fromkeys(row["load"] for row in results):
        rows = [cells(row["server"], row) for row in results if row["load"] == load]
        show(f"{shape}, {weights}, {load}, {prompt_len} + {new_tokens} tokens", COLUMNS, rows)
    if overhead:
        print(f"{clients} streams over HTTP take {overhead['ratio']:.3f} of Engine.generate's time")


if __name__ == "__main__":
    typer.run(main)
