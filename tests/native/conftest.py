import pytest
import torch

_C = pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512bf16"])
def isa(request):
    """Runs a test once for each instruction set of this machine."""
    chosen = _C.isa()
    if not _C.choose_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _C.choose_isa(chosen)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
