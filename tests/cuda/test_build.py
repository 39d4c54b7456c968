"""setup.py builds the kernels where asked to, and says what is wrong where it cannot."""

import os
import shutil
import subprocess
import sys

import pytest

from multiexit_engine._cuda.library import HeadCall, Library, loaded
from tests.cuda.building import NVCC, ROOT


def build(wanted, folder, **environment):
    sources = folder / "sources"
    sources.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "csrc" / "cuda", sources / "csrc" / "cuda")
    (sources / "multiexit_engine" / "_cuda").mkdir(parents=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "MULTIEXIT_CUDA": wanted, **environment}
    run = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    return run, sources / "multiexit_engine" / "_cuda" / "libmultiexit_cuda.so"


@pytest.mark.parametrize("wanted", ["yes", "70", "90,x"])
def test_a_wrong_wish_is_refused(wanted, tmp_path):
    run, library = build(wanted, tmp_path)
    assert run.returncode and "must be 0, 1, or compute capabilities from 80 on" in run.stderr
    assert not library.exists()


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_the_kernels_are_built_for_the_capabilities_asked_for(tmp_path):
    run, library = build("90", tmp_path)
    assert run.returncode == 0, run.stderr
    call = HeadCall(rows=7, vocab=16, width=16, number_type=1)
    with pytest.raises(ValueError, match="rows must be 1 to 4"):
        Library(library).plan(call)
    # a machine without a driver, or with an old one, is told so
    assert loaded(library).multiexit_graph_check() in (0, -2)
