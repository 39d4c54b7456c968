"""The C interface of csrc/cuda (head_call.h) by ctypes: numbers and addresses, no tensors.

One build serves every Python and every PyTorch: the library knows neither.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_uint64
from pathlib import Path

PATH = Path(__file__).with_name("libmultiexit_cuda.so")
INTERFACE = 4


class HeadCall(ctypes.Structure):
    """``MultiexitHeadCall``: addresses on the device, then the shape."""

    _fields_ = [
        *(
            (name, c_uint64)
            for name in (
                "hidden",
                "weight",
                "bias",
                "lower_hidden",
                "lower_weight",
                "alpha",
                "temperature",
                "seeds",
                "positions",
                "tokens",
                "log_probs",
                "num_candidates",
                "kept",
                "scratch",
            )
        ),
        *((name, c_int64) for name in ("rows", "vocab", "width", "number_type")),
    ]


class HeadPlan(ctypes.Structure):
    """``MultiexitHeadPlan``."""

    _fields_ = [
        (name, c_int64) for name in ("blocks", "piece_bytes", "shared_bytes", "scratch_bytes")
    ]


def loaded(path: Path) -> ctypes.CDLL:
    """A build; raises ImportError where there is none, or one of other sources than these."""
    if not path.exists():
        raise ImportError(
            f"the CUDA kernels are not built ({path.name} is missing): install with "
            "MULTIEXIT_CUDA=1 where nvcc is, see docs/gpu.md"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the CUDA kernels do not load: {error}") from error
    found = library.multiexit_cuda_interface()
    if found != INTERFACE:
        raise ImportError(
            f"{path.name} has interface {found}, these sources have {INTERFACE}: build it anew"
        )
    return library


class Library:
    """The functions of one build."""

    def __init__(self, path: Path) -> None:
        """Load a build.

        Raises:
            ImportError: there is none at ``path``, or it is of other sources than these.
        """
        self._library = loaded(path)
        self._library.multiexit_cuda_error.restype = c_char_p
        self._library.multiexit_head_tokens.argtypes = [
            ctypes.POINTER(HeadCall),
            ctypes.POINTER(HeadPlan),
            c_uint64,
        ]
        self.path = path
        self.kept_bytes: int = self._library.multiexit_head_kept_bytes()

    def plan(self, call: HeadCall) -> HeadPlan:
        """How the current device runs calls of this shape; addresses are not looked at.

        Raises:
            ValueError: the kernels cannot run it, or there is no device.
        """
        plan = HeadPlan()
        self._check(self._library.multiexit_head_plan(ctypes.byref(call), ctypes.byref(plan)), call)
        return plan

    def run(self, call: HeadCall, plan: HeadPlan, stream: int) -> None:
        """Launch on a stream of the current device.

        Raises:
            ValueError: an address is missing or misaligned, or CUDA refuses the launch.
        """
        self._check(self._library.multiexit_head_tokens(call, plan, stream), call)

    def constant(self, name: str) -> c_int:
        """A number of the library that may be changed."""
        return c_int.in_dll(self._library, name)

    def _check(self, code: int, call: HeadCall) -> None:
        if code == 0:
            return
        reason = self._library.multiexit_cuda_error(c_int(code)).decode()
        raise ValueError(
            f"head of {call.vocab} x {call.width} for {call.rows} rows, numbers of type "
            f"{call.number_type}: {reason}"
        )
