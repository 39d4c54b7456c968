"""The kernels of DoLa, for the compile test: GPT-2's vocabulary, and one five times as large."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from multiexit_engine.kernels import dola
from multiexit_engine.kernels.launch import options
from tests.kernels.shipped import Shipped

_FLOATS = ("mature", "premature", "softmax", "divergence", "relative_top", "log_prob")
TYPES = {f"{name}_ptr": "*fp32" for name in _FLOATS} | {"best_ptr": "*i32", "place_ptr": "*i64"}


def differences() -> Iterator[Shipped]:
    """Every kernel with both forms, with candidates to compare and without."""
    block, warps, single = {"BLOCK": dola.BLOCK}, options(dola.WARPS), torch.float32
    yield Shipped("dola softmax", dola.softmax_kernel, single, block, warps, TYPES)
    for parts in (32, 128):
        for published in (False, True):
            constants = {**block, "PARTS": parts, "PUBLISHED": published}
            name = f"dola divergence {parts} published={published}"
            yield Shipped(name, dola.divergence_kernel, single, constants, warps, TYPES)
        for compared in (False, True):
            constants = {**block, "PARTS": parts, "COMPARED": compared}
            if not compared:
                constants["divergence_ptr"] = None
            name = f"dola score {parts} compared={compared}"
            yield Shipped(name, dola.score_kernel, single, constants, warps, TYPES)
        yield Shipped("dola join", dola.join_kernel, single, {"PARTS": parts}, options(4), TYPES)
