"""The kernels of rows that choose their exit on the device, for the compile test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from multiexit_engine.kernels import exit_rows
from multiexit_engine.kernels.launch import options

_COLUMNS = ("measure", "shortlist", "left", "passed", "streak", "read", "join", "depth", "flag")
TYPES = {
    **{f"{name}_ptr": "*i32" for name in _COLUMNS},
    **{f"{name}_ptr": "*i32" for name in ("running", "running_before", "copied", "copied_before")},
    "source_ptr": "*i32",
    **{f"{name}_ptr": "*fp32" for name in ("log_prob", "second", "entropy", "told", "threshold")},
    "value_ptr": "*fp32", "best_ptr": "*i64", "owner_ptr": "*i64", "here_ptr": "*u8",
}  # fmt: skip
_OF_HEADS = ("token_ptr", "log_prob_ptr", "second_ptr", "entropy_ptr")
_Item = tuple[str, Any, torch.dtype, dict[str, Any], dict[str, int], dict[str, str]]


def exits() -> Iterator[_Item]:
    """Name, kernel, dtype, constants, options, types of arguments."""
    block = {"BLOCK": exit_rows._BLOCK}
    for name in ("asked", "beyond", "settle"):
        kernel = getattr(exit_rows, f"{name}_kernel")
        yield f"exit rows {name}", kernel, torch.float32, block, options(4, 64), TYPES
    for is_told, is_bound in ((False, False), (False, True), (True, False)):
        unused = _OF_HEADS if is_told else ("told_ptr",)
        constants = {**block, "TOLD": is_told, "BOUND": is_bound, **dict.fromkeys(unused)}
        name = f"exit rows decide told={is_told} bound={is_bound}"
        yield name, exit_rows.decide_kernel, torch.float32, constants, options(4, 64), TYPES
