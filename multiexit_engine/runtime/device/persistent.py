"""Lets the blocks of a model run in one launch, where the kernel for it is built."""

from __future__ import annotations

import importlib
from typing import Any

from multiexit_engine.models.base import MultiExitModel


def persistent_kernel() -> Any:
    """The kernel's front.

    Raises:
        ValueError: it is not built.
    """
    try:
        return importlib.import_module("multiexit_engine._cuda.built").blocks
    except ImportError as error:
        raise ValueError(
            f"persistent_blocks=True: {error}; or give persistent_blocks=False"
        ) from error


def run_in_one_launch(model: MultiExitModel, block_size: int) -> None:
    """Mark the blocks of a model: spans that begin with one run in one launch from now on.

    Raises:
        ValueError: the kernel does not serve them.
    """
    kernel = persistent_kernel()
    for block in model.blocks:
        reason = kernel.why_not_served(block)
        if reason is not None:
            raise ValueError(
                f"persistent_blocks=True: not for the blocks of {model.config.model_type!r}, since "
                f"{reason}; give persistent_blocks=False"
            )
    blocks = list(model.blocks)
    most_rows = kernel.most_rows(blocks, block_size)
    if not most_rows:
        raise ValueError(
            "persistent_blocks=True: the states of these layers do not fit the shared memory of "
            "this device; give persistent_blocks=False"
        )
    for block in blocks:
        block.most_persistent_rows = most_rows
