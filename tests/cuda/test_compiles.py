"""nvcc makes of the kernels, for every GPU we name, what they are written for."""

from pathlib import Path

import pytest

from tests.cuda.building import GRAPHS, LAYERS, NVCC, SOURCE, compiled

triton = pytest.importorskip("triton", reason="cuobjdump comes with it")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

EVERY_CARD = pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
# rows 1, 2 and 4, two types of numbers; heads with and without contrast
SOURCES = pytest.mark.parametrize(
    ("source", "kernels"), [(SOURCE, 12), (LAYERS, 6)], ids=["heads", "layers"]
)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@EVERY_CARD
@SOURCES
def test_no_register_spills_and_weights_bypass_them(source, kernels, capability, tmp_path):
    cubin = compiled(capability, tmp_path, CUOBJDUMP, source)
    assert cubin.stacks == [0] * kernels
    names = {name.split(".")[0] for name in cubin.instructions}
    assert not names & {"LDL", "STL"}
    bulk = {"UBLKCP", "SYNCS", "ACQBULK"}  # bulk copy, mbarrier, wait for the previous kernel
    asynchronous = {"LDGSTS", "LDGDEPBAR"}
    assert names >= (bulk if capability >= 90 else asynchronous)
    assert not names & (asynchronous if capability >= 90 else bulk)
    assert "LDS.128" in cubin.instructions


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@EVERY_CARD
def test_blocks_read_what_others_wrote_from_l2(capability, tmp_path):
    names = compiled(capability, tmp_path, CUOBJDUMP, LAYERS).instructions
    # an acquiring load of the counter, which empties L1, and a releasing sum
    assert any(name.startswith("LDG.E.STRONG.GPU") for name in names)
    assert "CCTL.IVALL" in names
    assert any(name.startswith("MEMBAR") and name.endswith("GPU") for name in names)
    assert any(name.startswith(("RED.E.ADD", "REDG.E.ADD")) for name in names)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@EVERY_CARD
def test_the_kernel_that_asks_the_counts_compiles(capability, tmp_path):
    assert compiled(capability, tmp_path, CUOBJDUMP, GRAPHS).stacks == [0]
