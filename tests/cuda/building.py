"""The CUDA C++ kernels compiled with g++ for fibers, and with nvcc for GPUs that are not there."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from multiexit_engine._cuda.blocks import Blocks
from multiexit_engine._cuda.heads import Heads
from multiexit_engine._cuda.layers import LayersLibrary
from multiexit_engine._cuda.library import Library

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "heads.cu"
LAYERS = ROOT / "csrc" / "cuda" / "layers.cu"
GRAPHS = ROOT / "csrc" / "cuda" / "graphs.cu"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
GXX = shutil.which("g++")
NVCC = shutil.which("nvcc")
HOST_FLAGS = (
    "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing "
    "-Wall -Werror -Wno-unknown-pragmas -DMULTIEXIT_ON_HOST"
)


@dataclass(frozen=True)
class OnFibers:
    """The kernels of a capability, on a model of a GPU."""

    library: Library
    heads: Heads
    blocks: Blocks

    def shaped(self, *, seed: int = 0, multiprocessors: int = 3, shared_kib: int = 227) -> OnFibers:
        """The model changed; even seeds run blocks one after the other, odd ones side by side."""
        self.library.constant("multiexit_host_seed").value = seed
        self.library.constant("multiexit_host_multiprocessors").value = multiprocessors
        self.library.constant("multiexit_host_shared_bytes").value = shared_kib * 1024
        layers = LayersLibrary(self.library.path)
        return replace(self, heads=Heads(self.library), blocks=Blocks(layers))

    def copied_bytes(self) -> int:
        """That the last kernel brought to shared memory."""
        return self.library.constant("multiexit_host_copied_bytes").value

    def asked_bytes(self) -> int:
        """That the last kernel had L2 fetch in bulk."""
        return self.library.constant("multiexit_host_asked_bytes").value


def on_fibers(capability: int, folder: Path, *flags: str) -> OnFibers:
    target = folder / f"libfibers{capability}.so"
    command = [GXX, *HOST_FLAGS.split(), f"-DMULTIEXIT_CAPABILITY={capability}", *flags,
               f"-I{ROOT / 'csrc'}", "-x", "c++", *map(str, SOURCES),
               "-o", str(target)]  # fmt: skip
    subprocess.run(command, check=True)
    library = Library(target)
    return OnFibers(library, Heads(library), Blocks(LayersLibrary(target)))


@dataclass(frozen=True)
class Cubin:
    """What came out of nvcc for one capability."""

    stacks: list[int]  # bytes of each kernel
    registers: list[int]
    instructions: set[str]


def compiled(capability: int, folder: Path, cuobjdump: Path, source: Path = SOURCE) -> Cubin:
    target = folder / f"{capability}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}",
               f"-arch=sm_{capability}", "-cubin", "-o", str(target), str(source)]  # fmt: skip
    subprocess.run(command, check=True)
    usage, code = (
        subprocess.run([cuobjdump, flag, target], capture_output=True, text=True, check=True)
        for flag in ("-res-usage", "-sass")
    )
    numbers = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z0-9_.]+)", code.stdout, re.M)
    return Cubin([int(n[1]) for n in numbers], [int(n[0]) for n in numbers], set(names))
