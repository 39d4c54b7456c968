"""Kernels run on the GPU where there is one, else in the repaired interpreter."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    from tests.kernels import interpreter  # noqa: F401


def pytest_collection_modifyitems(items):
    """On a GPU all kernel tests are ``gpu`` tests."""
    if not torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents and "device" in item.fixturenames:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def bytes_read(monkeypatch):
    """A function: the bytes of a tensor that kernels have read since the test began."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load
    addresses = []

    def counted(self, pointers, mask, *rest):
        addresses.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)

    def total(tensor):
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        elements = sum(int(((a >= first) & (a < last)).sum()) for a in addresses)
        return elements * tensor.element_size()

    return total
