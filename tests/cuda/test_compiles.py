"""nvcc makes of the kernels, for every GPU we name, what they are written for."""

from pathlib import Path

import pytest

from tests.cuda.building import GRAPHS, NVCC, compiled

triton = pytest.importorskip("triton", reason="cuobjdump comes with it")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# rows 1, 2 and 4, two types of numbers, with and without contrast
KERNELS = 12


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_no_register_spills_and_weights_bypass_them(capability, tmp_path):
    cubin = compiled(capability, tmp_path, CUOBJDUMP)
    assert cubin.stacks == [0] * KERNELS
    names = {name.split(".")[0] for name in cubin.instructions}
    assert not names & {"LDL", "STL"}
    bulk = {"UBLKCP", "SYNCS", "ACQBULK"}  # bulk copy, mbarrier, wait for the previous kernel
    asynchronous = {"LDGSTS", "LDGDEPBAR"}
    assert names >= (bulk if capability >= 90 else asynchronous)
    assert not names & (asynchronous if capability >= 90 else bulk)
    assert "LDS.128" in cubin.instructions


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_the_kernel_that_asks_the_counts_compiles(capability, tmp_path):
    assert compiled(capability, tmp_path, CUOBJDUMP, GRAPHS).stacks == [0]
