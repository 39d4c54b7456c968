"""The report must not fail on the machine where its minutes are dear."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")
def test_the_report_is_rehearsed_and_invents_no_times(tmp_path):
    output = tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu_report.py", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(output.read_text())
    parts = ("heads", "products", "codes", "attention", "steps", "exits", "answers")
    lines = [line for part in parts for line in result[part]] + result["models"]["rows"]
    times = [v for line in lines for k, v in line.items() if k.endswith("us")]
    assert times
    assert all(time != time for time in times), "a time that nobody measured"
    assert all(bar["reached"] != bar["reached"] for bar in result["models"]["bars"])
    assert set(result["engine"].values()) == {"equal"}
