"""Build of the C++ CPU backend, and of the CUDA C++ kernels where asked for.

The package's metadata and tools are in pyproject.toml. The C++ extension is optional: without a
compiler the package installs all the same and computes with PyTorch alone. The CUDA kernels are
built if MULTIEXIT_CUDA is "1", or a list of compute capabilities such as "90,100"; then a build
that fails is an error.
"""

import os
import shutil
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
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
CUDA_LIBRARY = "multiexit_engine._cuda.libmultiexit_cuda"
# Code of a capability runs on later ones of the same generation: sm_80 on 86 and 89, sm_100 on 103.
CUDA_CAPABILITIES = ("80", "90", "100", "120")
CUDA_FLAGS = (
    "-std=c++17 -O3 -fmad=false -shared -cudart static --threads 0 "
    "-Xcompiler -fPIC,-fvisibility=hidden -Xlinker -s -Icsrc"
)
RULES = """
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in -o $out $linkflags
"""


def cuda_capabilities():
    """What MULTIEXIT_CUDA asks for; nothing where it is empty or 0."""
    wanted = os.environ.get("MULTIEXIT_CUDA", "0").strip()
    if wanted in ("", "0"):
        return ()
    capabilities = CUDA_CAPABILITIES if wanted == "1" else tuple(wanted.split(","))
    if not all(each.isdigit() and int(each) >= 80 for each in capabilities):
        sys.exit(
            f"MULTIEXIT_CUDA={wanted!r}: must be 0, 1, or compute capabilities from 80 on, "
            'joined by commas, such as "90,100"'
        )
    return capabilities


def nvcc_command(nvcc, capabilities, target):
    """Machine code for each capability, and of the last one code that later GPUs can translate."""
    last = capabilities[-1]
    return [
        nvcc,
        *CUDA_FLAGS.split(),
        *(f"-gencode=arch=compute_{each},code=sm_{each}" for each in capabilities),
        f"-gencode=arch=compute_{last},code=compute_{last}",
        *("-o", str(target), *CUDA_SOURCES),
    ]


class BuildWithNinja(build_ext):
    """Compiles side by side, and only what changed; a failure is reported and survived."""

    def get_ext_filename(self, fullname):
        # asked for with and without its package; no module of Python: ctypes loads it
        if fullname.split(".")[-1] == CUDA_LIBRARY.split(".")[-1]:
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if ext.name == CUDA_LIBRARY:
            self._build_cuda(ext)
            return
        try:
            self._build(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            sys.stderr.write(
                f"multiexit-engine: the C++ kernels were NOT built ({error}). "
                "The engine will compute with PyTorch alone, several times slower. "
                "Install a C++17 compiler (apt install g++) and install the package again.\n"
            )

    def _build_cuda(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
        if nvcc is None:
            sys.exit(
                "MULTIEXIT_CUDA asks for the CUDA kernels, but there is no nvcc in PATH or "
                f"{home}/bin: install the CUDA toolkit, or leave MULTIEXIT_CUDA empty and the "
                "engine will use its Triton kernels"
            )
        subprocess.run(nvcc_command(nvcc, cuda_capabilities(), target), check=True)

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


extensions = [Extension("multiexit_engine._C", sources=SOURCES, optional=True)]
if cuda_capabilities():
    # in front, as it takes seconds and the other minutes
    extensions.insert(0, Extension(CUDA_LIBRARY, sources=CUDA_SOURCES))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithNinja},
)
