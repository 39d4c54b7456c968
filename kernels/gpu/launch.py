"""What every launch needs to know of its surroundings: the device, the interpreter, the scratch.

Knows nothing of any op.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

_kept: dict[tuple[str, torch.device], Tensor] = {}


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one that it waits for has ended."""
    return not INTERPRETED and device.type == "cuda" and capability(device) >= (9, 0)


def options(num_warps: int, max_registers: int | None = None) -> dict[str, int]:
    """Launch options; without a number of registers, ptxas weighs them against occupancy.

    It then may store a few of a small kernel to memory to fit one more program on a multiprocessor
    (contrast_finish_kernel, sm_120: 79 registers, 24 bytes spilled; none with 128 allowed).
    """
    if max_registers is None:
        return {"num_warps": num_warps}
    return {"num_warps": num_warps, "maxnreg": max_registers}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; (0, 0) where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def kept_scratch(name: str, values: list[float], length: int, device: torch.device) -> Tensor:
    """[len(values), length] float32 rows that hold ``values`` and that kernels leave as found.

    One buffer for each name and device lives as long as the process, so graphs may refer to it and
    need no node to fill it; users of one name must not run at the same time. Inside a capture
    that comes before any other use, the buffer belongs to that graph.
    """
    key = (name, device)
    if key in _kept:
        return _kept[key]
    scratch = torch.empty(len(values), length, dtype=torch.float32, device=device)
    for row, value in zip(scratch, values, strict=True):
        row.fill_(value)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _kept[key] = scratch
    return scratch
