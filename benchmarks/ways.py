"""Ways of decoding in one alternating run: the engine's, the peers', and a plain read of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoints import Shape
from peer_process import Answer, PeerProcess
from report import alternate, median
from roster import Peer, is_installed, python_of, start_peer

from multiexit_engine import _C, DecodingMode, Engine, SamplingParams
from multiexit_engine.checkpoint.huge_pages import HugePages

KV_BYTES = 512 << 20
READS_PER_TURN = 4


@dataclass
class Way:
    """One way of running the prompts, and what it did.

    Attributes:
        name: in tables; with ``weights`` it is unique in a run.
        weights: type of the weights that it reads.
        mode: "original", "contrast", "exit" or "mixed"; ways of one mode must give the same tokens.
        num_tokens: how many new tokens one turn makes.
        tokens: of the last turn.
        seconds: of the measured turns.
    """

    name: str
    weights: str
    mode: str
    run: Callable[[], Answer]
    num_tokens: int
    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def turn(self) -> float:
        """Run once; returns seconds."""
        answer = self.run()
        self.tokens = answer.tokens
        return answer.seconds

    @property
    def rate(self) -> float:
        """New tokens per second of the median turn."""
        return self.num_tokens / median(self.seconds)


def measure(ways: Sequence[Way], rounds: int) -> None:
    """Let every way run in turn, one unmeasured round first."""
    seconds = alternate({f"{way.name} {way.weights}": way.turn for way in ways}, rounds)
    for way, values in zip(ways, seconds.values(), strict=True):
        way.seconds = values


def load_engine(
    checkpoint: Path, shape: Shape, weights: str, backend: str, max_batch_size: int
) -> Engine:
    """The engine with its weights in a type: a dtype, or "int8" and the like."""
    quantization = weights if weights.startswith("int") else None
    return Engine.from_pretrained(
        checkpoint,
        dtype="bfloat16" if quantization else weights,
        quantization=quantization,
        backend=backend,
        prefix_caching=False,
        max_batch_size=max_batch_size,
        kv_cache_memory=KV_BYTES,
        lm_head_layer_indices=[shape.lower, shape.upper],
    )


def engine_way(
    engine: Engine,
    name: str,
    weights: str,
    mode: DecodingMode | list[DecodingMode],
    prompts: list[list[int]],
    new_tokens: int,
) -> Way:
    """The engine's greedy tokens of all prompts at once."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)

    def run() -> Answer:
        started = time.perf_counter()
        outputs = engine.generate(prompts, params, mode)
        seconds = time.perf_counter() - started
        return Answer([output.outputs[0].token_ids for output in outputs], seconds)

    kind = "mixed" if isinstance(mode, list) else type(mode).__name__.lower()
    return Way(f"engine {name}", weights, kind, run, len(prompts) * new_tokens)


def peer_way(
    peer: Peer, process: PeerProcess, weights: str, prompts: list[list[int]], new_tokens: int
) -> Way:
    """A peer's greedy tokens of all prompts at once."""
    return Way(
        peer.title,
        weights,
        peer.mode,
        lambda: process.generate(prompts, new_tokens),
        len(prompts) * new_tokens,
    )


def start_peers(
    peers: Sequence[Peer],
    pythons: dict[str, str],
    shape: Shape,
    checkpoint: Path,
    weights: Sequence[str],
    batch: int,
) -> list[tuple[Peer, str, PeerProcess]]:
    """A process for each peer and type of weights; says which peers are not installed.

    Transformers runs in float32 besides, since its better dtype is what counts.
    """
    threads = torch.get_num_threads()
    found = []
    for peer in peers:
        python = python_of(peer, pythons)
        if not is_installed(peer, python):
            print(f"{peer.title}: not installed in {python}; {peer.install}")
            continue
        always = ("float32",) if peer.name == "transformers" else ()
        for kind in peer.weights:
            if kind in (*weights, *always):
                process = start_peer(peer, python, shape, checkpoint, kind, threads, batch)
                print(f"{peer.title} {process.version}, {kind}: ready", flush=True)
                found.append((peer, kind, process))
    return found


def plain_read_way() -> tuple[Way, int]:
    """Numbers summed as they stream by, with the bytes of one turn: the ceiling of this machine.

    They lie in huge pages, as the engine's weights do; ordinary ones are some 6 % slower to read.
    """
    numbers = HugePages().empty(torch.Size((64 << 20,)), torch.float32).fill_(1)
    threads = torch.get_num_threads()

    def run() -> Answer:
        started = time.perf_counter()
        for _ in range(READS_PER_TURN):
            _C.plain_read(threads, numbers.data_ptr(), numbers.numel())
        return Answer([], time.perf_counter() - started)

    return Way("plain read", "", "read", run, 0), READS_PER_TURN * numbers.nbytes


def stolen_seconds(processes: Sequence[PeerProcess], run: Callable[[], object]) -> float:
    """CPU seconds that stopped peers used while ``run`` ran: zero, or the figures are worthless."""
    before = sum(process.cpu_seconds() for process in processes)
    run()
    return sum(process.cpu_seconds() for process in processes) - before
