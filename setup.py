"""Build of the C++ CPU backend; the package's metadata and tools are in pyproject.toml.

The extension is optional: without a compiler the package installs all the same and computes with
PyTorch alone.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
# No flag names an instruction set: the kernels choose theirs by pragma, and at run time. Products
# and sums are fused only where the code says so, or results would depend on the compiler's whim.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off"
# g++ 12 finds uninitialized values in its own AVX-512 headers
WARNINGS = "-Wall -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
RULES = """
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in -o $out $linkflags
"""


class BuildWithNinja(build_ext):
    """Compiles side by side, and only what changed; a failure is reported and survived."""

    def build_extension(self, ext):
        try:
            self._build(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            sys.stderr.write(
                f"multiexit-engine: the C++ kernels were NOT built ({error}). "
                "The engine will compute with PyTorch alone, several times slower. "
                "Install a C++17 compiler (apt install g++) and install the package again.\n"
            )

    def _build(self, ext):
        import ninja
        import pybind11

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        include = [pybind11.get_include(), sysconfig.get_path("include")]
        flags = [
            FLAGS,
            WARNINGS,
            f"-I{Path('csrc').resolve()}",
            *(f"-isystem {path}" for path in include),
        ]
        link = ["-undefined dynamic_lookup", "-bundle"] if sys.platform == "darwin" else ["-shared"]
        objects = {source: folder / f"{Path(source).stem}.o" for source in ext.sources}
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"flags = {' '.join(flags)}",
            f"linkflags = {' '.join([*link, '-pthread', '-s'])}",
            RULES,
            *(f"build {out}: compile {Path(source).resolve()}" for source, out in objects.items()),
            f"build {target}: link {' '.join(map(str, objects.values()))}",
            "",
        ]
        file = folder / "build.ninja"
        file.write_text("\n".join(lines))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True)


setup(
    ext_modules=[Extension("multiexit_engine._C", sources=SOURCES, optional=True)],
    cmdclass={"build_ext": BuildWithNinja},
)
