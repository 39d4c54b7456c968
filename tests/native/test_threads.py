"""The thread team: forks, other threads, and the environment's choice of kernels."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from multiexit_engine._native import linear

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("g++")
X = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(2048, 512, generator=torch.Generator().manual_seed(1))


def test_a_forked_process_has_a_team_of_its_own(threads):
    expected = linear(X, WEIGHT, None)
    child = os.fork()
    if child == 0:
        equal = all(torch.equal(linear(X, WEIGHT, None), expected) for _ in range(10))
        os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_calls_from_many_threads_at_once(threads):
    expected = linear(X, WEIGHT, None)
    results = []

    def call():
        results.extend(torch.equal(linear(X, WEIGHT, None), expected) for _ in range(50))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 200


@pytest.mark.parametrize("name", ["scalar", "avx2", "no such set"])
def test_environment_chooses_the_instruction_set(name):
    code = "from multiexit_engine import _C; print(_C.isa())"
    chosen = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MULTIEXIT_CPU_ISA": name},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert chosen == name or (name not in ("scalar", "avx2") and chosen != "scalar")


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_a_chunk_runs_once_however_fast_jobs_follow_each_other(tmp_path):
    program = tmp_path / "test_threads"
    sources = [CSRC / "tests" / "test_threads.cpp", CSRC / "cpu" / "threads.cpp"]
    flags = ["-std=c++17", "-O2", "-pthread"]
    subprocess.run([COMPILER, *flags, f"-I{CSRC}", *map(str, sources), "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
