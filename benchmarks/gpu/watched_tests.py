"""A plugin of pytest: what each test gave, as it comes, and an end for workers that are of no use.

A test that hangs ends its worker, as does one that leaves the GPU's context poisoned, since all
tests behind it would fail as well; pytest-xdist starts another worker and goes on.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LINES = "MULTIEXIT_TEST_LINES"
MOST_SECONDS = "MULTIEXIT_TEST_SECONDS"
_POISON = ("CUDA error", "Triton Error [CUDA]", "CUDA-capable device", "AcceleratorError")


def _write(line: dict[str, Any]) -> None:
    with Path(os.environ[LINES]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Workers tell nothing of tests: what they report comes to the process that began them.

    Their environment does not say who they are: it is inherited by what a worker starts.
    """
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Teller())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """End the process of a test that takes too long, whatever holds it."""
    seconds = float(os.environ.get(MOST_SECONDS, "0"))
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """End the worker whose context is poisoned, while the test that did it is under way."""
    report: Any = yield
    text = str(report.longrepr)
    is_worker = hasattr(item.config, "workerinput")
    if report.failed and is_worker and any(each in text for each in _POISON) and _is_lost():
        _write({"test": item.nodeid, "outcome": "poisoned", "text": text[-600:]})
        os._exit(1)
    return report


def _is_lost() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Teller:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell of a test, once."""
        if report.when != "call" and report.outcome == "passed":
            return
        text = {} if report.outcome != "failed" else {"text": str(report.longrepr)[-600:]}
        _write({"test": report.nodeid, "outcome": report.outcome, **text})
