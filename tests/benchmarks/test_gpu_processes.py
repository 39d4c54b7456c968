"""A part of the GPU report that is lost costs the case that it was lost in."""

import sys
import time

import pytest

from benchmarks.gpu import gpu_tests, processes

REASONS = {
    "raise": "ValueError: no such tile",
    "poison": "RuntimeError: an illegal memory access was encountered",
    "crash": "killed by SIGSEGV: ",
    "hang": "nothing was heard of it for 2 s",
    "exit": "exit status 3: what it said last",
}


def run(of, limit_s=60.0, patience_s=2.0, keep=lambda _: None):
    command = [sys.executable, "-m", "benchmarks.gpu.part", "tests.benchmarks.lost_cases"]
    return processes.run_part(
        [*command, "--of", of, "--card", "4.5", "nan"], limit_s, patience_s, keep
    )


@pytest.mark.parametrize("of", REASONS)
def test_the_cases_around_a_lost_one_are_measured(of):
    found = run(of)
    assert found.rows == [
        {"case": "before", "us": 1.0}, {"case": "after", "us": 2.0}, {"case": "after", "us": 4.5},
    ]  # fmt: skip
    assert found.failed == [{"case": of, "error": REASONS[of]}]


def test_what_was_found_is_told_before_a_process_is_lost():
    kept = []
    run("hang", limit_s=2.0, patience_s=60, keep=lambda found: kept.append(list(found.rows)))
    assert kept[0] == [{"case": "before", "us": 1.0}]


def test_a_part_ends_at_its_limit():
    began = time.monotonic()
    found = run("hang", limit_s=2.0, patience_s=60)
    assert time.monotonic() - began < 20
    assert found.failed == [{"case": "hang", "error": "out of time"}]


def test_a_part_that_does_not_begin_is_tried_once():
    found = processes.run_part([sys.executable, "-c", "raise SystemExit('no module')"], 60, 30)
    assert found.rows == []
    assert found.failed == [{"error": "exit status 1: no module"}]


TESTS = """
import os, sys, time, types

def lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_good(): pass
def test_bad(): assert 1 == 2
def test_crashes(): os._exit(1)
def test_hangs(): time.sleep(60)
def test_poisons():
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(synchronize=lost))
    lost()
"""


def test_a_test_that_is_lost_costs_no_other(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS + "def test_last(): pass\n")
    found = gpu_tests.run_tests(60, (str(tmp_path),), "not gpu", patience_s=3)
    assert found["outcomes"] == {"passed": 2, "failed": 3, "poisoned": 1}
    errors = {line["test"].split("::")[1]: line["error"] for line in found["failed"]}
    assert set(errors) == {"test_bad", "test_crashes", "test_hangs", "test_poisons"}
    assert "illegal memory access" in errors["test_poisons"]
    assert "crashed while running" in errors["test_hangs"]
