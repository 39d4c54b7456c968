"""Every shipped configuration compiles for every GPU we name, and spills no registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.compiling import OVERLAPS

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_configuration_compiles_without_spills(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling", str(capability)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert reports
    assert not [report for report in reports if report["stack"]]
    limit = SHARED_MEMORY[capability] * 1024
    assert not [report for report in reports if report["shared"] > limit]
    # from sm_90 on the kernels of a decode step begin early; but for lists of rows, and where there
    # is nothing to read, they ask for what is read later
    step = [r for r in reports if r["name"].startswith(("product", "short", "merge", "norm"))]
    begins = tuple(name for name in OVERLAPS if "prefetch" not in name)
    allowed = {begins, OVERLAPS} if capability >= 90 else {()}
    assert {tuple(r["overlap"]) for r in step} == allowed
    reading = [r for r in step if r["name"].startswith(("product", "short"))]
    whole = {tuple(r["overlap"]) for r in reading if "listed" not in r["name"]}
    assert whole == ({OVERLAPS} if capability >= 90 else {()})
    # one instruction for any number of rows, so that a row's bits do not depend on the others
    rows = ("product", "head rows")
    skinny = [r for r in reports if r["name"].startswith(rows) and "float32" not in r["name"]]
    assert {tuple(r["products"]) for r in skinny} == {("mma.sync.aligned.m16n8k16",)}
