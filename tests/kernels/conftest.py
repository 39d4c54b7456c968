"""Kernels run on the GPU where there is one, else in the repaired interpreter."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    from tests.kernels import interpreter  # noqa: F401


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents and "device" in item.fixturenames:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
