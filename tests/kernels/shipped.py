"""What the compile test compiles: a kernel with its constants and options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

DTYPES = (torch.bfloat16, torch.float32)


class Shipped(NamedTuple):
    """A kernel as the engine launches it."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    options: dict[str, int]
    types: dict[str, str] = {}
