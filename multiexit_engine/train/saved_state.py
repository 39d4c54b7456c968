"""What a training run must find again after it was killed: weights, optimisers, where it stood.

It knows one file of a folder. It does not know what is trained or how far a run goes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"


def save_state(
    folder: Path,
    network: nn.Module,
    optimizers: list[optim.Optimizer],
    counters: dict[str, int | float],
) -> None:
    """Replaces the state in `folder`; `counters` say where the run stands, `step` among them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        **counters,
        "network": network.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    # A run may be killed while it writes: the last whole state must survive that.
    partial = folder / f"{STATE_FILE}.partial"
    torch.save(state, partial)
    partial.replace(folder / STATE_FILE)


def load_state(
    folder: Path, network: nn.Module, optimizers: list[optim.Optimizer], device: torch.device
) -> dict[str, Any] | None:
    """Puts the state in `folder` back and returns its counters; None when there is no state."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    network.load_state_dict(state.pop("network"))
    for optimizer, own in zip(optimizers, state.pop("optimizers"), strict=True):
        optimizer.load_state_dict(own)
    logger.info("resumed at step %d", state["step"])
    return state
