"""The kernels run on fibers, both kinds of ring; on a GPU where one and the library are there."""

import pytest

pytest.importorskip("triton", reason="the scratch of GPU kernels is kept beside Triton's")

import torch

from tests.cuda import building
from tests.cuda.building import OnFibers


@pytest.fixture(scope="session", params=[90, 80], ids=["bulk copies", "16-byte copies"])
def fibers(request, tmp_path_factory) -> OnFibers:
    if building.GXX is None:
        pytest.skip("no g++")
    return building.on_fibers(request.param, tmp_path_factory.mktemp("fibers"))


@pytest.fixture
def ring(fibers) -> OnFibers:
    """The model as it is at first."""
    return fibers.shaped()


@pytest.fixture
def built():
    """The library of this installation, with a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return pytest.importorskip("multiexit_engine._cuda.built")
