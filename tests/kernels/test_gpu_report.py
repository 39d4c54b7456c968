"""The report must not fail on the machine where its minutes are dear."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# of each kind of part; the ring is rehearsed in tests/cuda
PARTS = {
    "head_cases": [],
    "product_cases": [],
    "code_cases": [],
    "step_cases": [],
    "exit_cases": [],
    "answer_cases": [],
    "model_cases": ["gpt2-medium"],
}
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a rehearsal for machines without a GPU"
)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_rehearsed_and_invents_no_times(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    lines = rows_of(module, *PARTS[name])
    times = [v for line in lines for k, v in line.items() if k.endswith("us")]
    assert times
    assert all(time != time for time in times), "a time that nobody measured"
    assert not [line["error"] for line in lines if "error" in line]
    assert all(line["reached"] != line["reached"] for line in lines if "reached" in line)


def test_the_engine_is_checked_in_every_way(monkeypatch):
    from benchmarks.gpu import engine_check

    assert {row["ids"] for row in rows_of(engine_check)} == {"equal"}


def rows_of(module, *of):
    from benchmarks.gpu.cases import Card

    found = [case.measure() for case in module.cases(Card(math.nan, math.nan), *of)]
    return [row for one in found for row in (one if isinstance(one, list) else [one])]


def test_the_report_is_rehearsed(tmp_path):
    output = tmp_path / "report.json"
    run = subprocess.run(
        [
            sys.executable,
            "benchmarks/gpu_report.py",
            "--output",
            str(output),
            "--only",
            "attention",
        ],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["machine"]["gpu"].startswith("none")
    assert math.isnan(result["ceilings"]["read_TB_s"])
    assert result["parts"]["attention"]["failed"] == []
    assert [row["model"] for row in result["parts"]["attention"]["rows"]]


def test_what_does_not_fit_the_budget_is_named(tmp_path, capsys):
    from benchmarks import gpu_report

    report = gpu_report.Report(tmp_path / "report.json", budget_s=5)
    report.run("heads", gpu_report.PARTS["heads"], (math.nan, math.nan))
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["parts"] == {}
    assert kept["left out"]["heads"] == "5 s of the budget were left, it takes about 25"
