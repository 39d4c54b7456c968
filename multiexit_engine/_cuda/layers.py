"""The C interface of the persistent decode kernel (layers_call.h) by ctypes, without tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_uint64
from pathlib import Path

from multiexit_engine._cuda.library import PATH, loaded

ACTIVATIONS = {
    "gelu": 0,
    "gelu_fast": 1,
    "gelu_new": 1,
    "gelu_pytorch_tanh": 1,
    "quick_gelu": 2,
    "relu": 3,
    "silu": 4,
    "swish": 4,
}


class Matrix(ctypes.Structure):
    """``MultiexitMatrix``."""

    _fields_ = [("weight", c_uint64), ("bias", c_uint64)]


class Norm(ctypes.Structure):
    """``MultiexitNorm``."""

    _fields_ = [("gain", c_uint64), ("shift", c_uint64)]


class Layer(ctypes.Structure):
    """``MultiexitLayer``."""

    _fields_ = [
        ("matrices", Matrix * 4),
        ("norms", Norm * 2),
        ("key_cache", c_uint64),
        ("value_cache", c_uint64),
        ("window", c_int64),
        ("scale", c_float),
        ("epsilons", c_float * 2),
        ("unused", c_float),
    ]


class LayersCall(ctypes.Structure):
    """``MultiexitLayersCall``: addresses on the device, then the shape."""

    _fields_ = [
        *(
            (name, c_uint64)
            for name in (
                "layers",
                "hidden",
                "output",
                "slots",
                "positions",
                "contexts",
                "block_tables",
                "cos",
                "sin",
                "kept",
                "scratch",
                "then",
            )
        ),
        *(
            (name, c_int64)
            for name in (
                "then_bytes",
                "rows",
                "width",
                "heads",
                "kv_heads",
                "head_dim",
                "inner",
                "num_layers",
                "block_size",
                "table_stride",
                "number_type",
                "activation",
                "is_gated",
                "has_shift",
            )
        ),
    ]


class LayersPlan(ctypes.Structure):
    """``MultiexitLayersPlan``."""

    _fields_ = [
        (name, c_int64) for name in ("blocks", "slot_bytes", "shared_bytes", "scratch_bytes")
    ]


class LayersLibrary:
    """The functions of one build."""

    def __init__(self, path: Path = PATH) -> None:
        """Load a build.

        Raises:
            ImportError: there is none at ``path``, or it is of other sources than these.
        """
        self._library = loaded(path)
        self._library.multiexit_cuda_error.restype = c_char_p
        self._library.multiexit_layers_run.argtypes = [
            ctypes.POINTER(LayersCall),
            ctypes.POINTER(LayersPlan),
            c_uint64,
        ]
        self.path = path
        self.kept_bytes: int = self._library.multiexit_layers_kept_bytes()

    def plan(self, call: LayersCall) -> LayersPlan:
        """How the current device runs calls of this shape; addresses are not looked at.

        Raises:
            ValueError: the kernel cannot run it, or there is no device.
        """
        plan = LayersPlan()
        found = self._library.multiexit_layers_plan(ctypes.byref(call), ctypes.byref(plan))
        self._check(found, call)
        return plan

    def run(self, call: LayersCall, plan: LayersPlan, stream: int) -> None:
        """Launch on a stream of the current device.

        Raises:
            ValueError: an address is missing or misaligned, or CUDA refuses the launch.
        """
        self._check(self._library.multiexit_layers_run(call, plan, stream), call)

    def _check(self, code: int, call: LayersCall) -> None:
        if code == 0:
            return
        reason = self._library.multiexit_cuda_error(c_int(code)).decode()
        raise ValueError(
            f"{call.num_layers} layers of width {call.width}, {call.heads} heads of "
            f"{call.head_dim}, for {call.rows} rows, numbers of type {call.number_type}: {reason}"
        )
