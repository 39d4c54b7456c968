"""Kernels of the simulated device: references that wait for nobody but inside of their launch.

A reference may ask how many rows are listed. On a device a kernel does that: here one operation of
the stream, which reads its operands when its turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from multiexit_engine.ops import RaggedSources, RaggedTexts, RowList, listed_linear, ragged_blocks
from multiexit_engine.ops.registry import Backend
from tests.simulated_device.tensors import SimulatedTensor, devices, nonsense


def use_kernels(patch: pytest.MonkeyPatch) -> None:
    """Have the simulated device run these kernels from now on."""
    for op, name in ((ragged_blocks, "run_ragged_blocks"), (listed_linear, "run_listed_linear")):
        supports = op.backends["triton"].supports
        own = Backend("sim", f"{__name__}:{name}", "sim", supports)
        patch.setitem(op.backends, "sim", own)


def run_ragged_blocks(
    hidden: Tensor,
    blocks: Sequence[Any],
    texts: RaggedTexts,
    sources: RaggedSources | None = None,
    is_attended: bool = False,
) -> Tensor:
    """See ``multiexit_engine.ops.ragged_blocks``."""
    args = hidden, blocks, texts, sources, is_attended
    return devices[-1].kernel(lambda: ragged_blocks.reference(*args), _empty(hidden.shape))


def run_listed_linear(x: Tensor, weight: Any, bias: Tensor | None, listed: RowList) -> Tensor:
    """See ``multiexit_engine.ops.row_lists``."""
    args = x, weight, bias, listed
    shape = x.shape[0], weight.shape[0]
    return devices[-1].kernel(lambda: listed_linear.reference(*args), _empty(shape))


def _empty(shape: Sequence[int]) -> SimulatedTensor:
    return SimulatedTensor(nonsense(torch.empty(tuple(shape))))
