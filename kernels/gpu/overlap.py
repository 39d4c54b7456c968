"""What one launch does for the next: lets it begin early, and asks for the weights it will read.

A step of few rows is a chain of short kernels, most of whose time would be waiting: for the launch,
and for the first bytes. Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.launch import overlaps_launches

# Bytes that a launch asks for at most: a part of a large card's L2.
_MOST_AHEAD = 16 << 20
_is_on = True


@triton.jit
def arrive(ahead_ptr, ahead_bytes, OVERLAP: tl.constexpr):
    """The first line of a kernel, which reads nothing before that an earlier launch writes.

    Lets the next launch begin, asks for a share of ``ahead_bytes`` bytes, waits for the launch
    before. As that one waited too, all earlier ones have ended then.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if ahead_ptr is not None:
        _fetch(ahead_ptr, ahead_bytes)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _fetch(ahead_ptr, ahead_bytes):
    """This program's share of the bytes, into L2: one instruction of its first thread."""
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    place = tl.program_id(0) + tl.num_programs(0) * (
        tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)
    )
    share = tl.cdiv(tl.cdiv(ahead_bytes, programs), 128) * 128
    start = place * share
    size = tl.minimum(share, ahead_bytes - start) // 16 * 16
    if size > 0:
        address = ahead_ptr.to(tl.int64, bitcast=True) + start
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred is_first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [address, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def overlapped(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that calls ``arrive``.

    On sm_90 and later such a launch may be on the card before the one before it has ended.
    """
    if not _is_possible(device):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


def fetched(weight: Any, device: torch.device) -> tuple[Tensor | None, int]:
    """What ``arrive`` takes, to ask for a matrix, plain or quantized; of None nothing."""
    stored = weight if weight is None or isinstance(weight, Tensor) else weight.codes
    if stored is None or not _is_possible(device):
        return None, 0
    return stored, min(stored.nbytes, _MOST_AHEAD)


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """Launches in here begin when the one before has ended, and ask for nothing; to compare."""
    global _is_on
    _is_on = False
    try:
        yield
    finally:
        _is_on = True


def _is_possible(device: torch.device) -> bool:
    return _is_on and overlaps_launches(device)
