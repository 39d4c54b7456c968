"""Memory for weights in huge pages, where the system has them.

Weights are read from end to end for every token. In pages of 4 KB that means an address translation
for every 64 lines of cache, and a CPU's prefetcher stops at the end of each page. Small matrices
share a mapping, since none of them fills pages of 2 MB alone.

Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_SHARED_BYTES = 64 << 20
_ALIGNMENT = 64
_IS_LINUX = hasattr(mmap, "MADV_HUGEPAGE")


@dataclass
class HugePages:
    """Makes tensors one behind the other in mappings of huge pages.

    A mapping is freed with the last of its tensors; large tensors have one of their own. Where the
    system has no huge pages the same mappings consist of ordinary ones.
    """

    _shared: mmap.mmap | None = None
    _used: int = 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor of any numbers, aligned to 64 bytes."""
        size = shape.numel() * dtype.itemsize
        if not _IS_LINUX or size == 0:
            return torch.empty(shape, dtype=dtype)
        if 4 * size > _SHARED_BYTES:
            memory = _mapping(size)
            return _tensor(memory, _start(memory), shape, dtype)
        if self._shared is None or self._used + size > _SHARED_BYTES:
            self._shared, self._used = _mapping(_SHARED_BYTES), 0
        place = _start(self._shared) + self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return _tensor(self._shared, place, shape, dtype)


def _mapping(size: int) -> mmap.mmap:
    """Room for ``size`` bytes behind `_start`; pages that nobody writes take no memory."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _start(memory: mmap.mmap) -> int:
    """The first byte of the first whole huge page."""
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return -address % HUGE_PAGE


def _tensor(memory: mmap.mmap, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    flat = torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=offset)
    return flat.view(shape)
