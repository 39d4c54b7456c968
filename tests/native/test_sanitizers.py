"""The C++ tests under AddressSanitizer and UBSan."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("g++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_no_kernel_reads_or_writes_where_it_may_not(tmp_path):
    program = tmp_path / "kernels"
    sources = [*(CSRC / "tests" / "kernels").glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]
    flags = "-std=c++17 -O1 -g -ffp-contract=off -w -pthread -fno-sanitize-recover=all"
    checks = "-fsanitize=address,undefined"
    command = [COMPILER, *flags.split(), checks, f"-I{CSRC}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
