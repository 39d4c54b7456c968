"""What the device has to know of rows that choose their exit, and what it found out about them.

Beside the decode memory, row by row; filled in one copy, and read in one. Knows nothing of layers
that run or of heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multiexit_engine.modes import EarlyExit
from multiexit_engine.ops import ExitProgress, ExitRules, RowPaths, settle_paths
from multiexit_engine.ops.exit_rows import MEASURES
from multiexit_engine.runtime.device.packed import Packed

# beside the flags of ``RowPaths``: whether a row's token is chosen here, and whether more is wanted
# than the best one
CHOOSES, WISHES = 4, 8

_COLUMNS = ("measures", "shortlists", "joins", "depths", "flags", "sources")
_NUMBERS = ("owners", "joins", "depths", "flags", "sources")


class ExitRow(NamedTuple):
    """What a step has to know of one row.

    Attributes:
        owner: the row whose leaving ends the run of this one.
        joins: layers below the first that it runs; with a source at least so many.
        depth: layers up to the last that it may run; 0 for one that runs elsewhere, or is padding.
        flags: those of ``RowPaths``, ``CHOOSES`` and ``WISHES``.
        mode: how it chooses its exit, if it does.
        layers: at which it is asked.
        source: the row of the step before whose leaving says whether this one still waits, and
            where; -1 where that is known.
    """

    owner: int
    joins: int = 0
    depth: int = 0
    flags: int = 0
    mode: EarlyExit | None = None
    layers: frozenset[int] = frozenset()
    source: int = -1


class ExitMemory:
    """The inputs of rows that choose their exit, their progress and their results.

    Args:
        num_rows: of the decode memory, the spare one included.
        num_layers: of the model.
        device: where it lies.
    """

    def __init__(self, num_rows: int, num_layers: int, device: torch.device) -> None:
        rows = (num_rows,)
        self._inputs = Packed(
            [
                ("owners", torch.int64, rows),
                *((name, torch.int32, rows) for name in _COLUMNS),
                ("thresholds", torch.float32, rows),
                ("asks", torch.uint8, (num_layers + 1, num_rows)),
            ],
            device,
        )
        self._results = Packed(
            [("left", torch.int32, rows), ("values", torch.float32, rows)], device
        )
        self._asks_bytes = (num_layers + 1) * num_rows
        self.inputs = self._inputs.on_device
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._counts = torch.zeros(3, num_rows, dtype=torch.int32, device=device)

    def send(self, turn: int, rows: Sequence[ExitRow]) -> None:
        """Copy what is to be known of the first rows to the device.

        Args:
            turn: which twin; the step that used it last must be over.
            rows: those that run, padding included, and those behind them that are only asked.
        """
        arrays, count = self._inputs.on_host(turn), len(rows)
        columns = zip(*rows, strict=True) if rows else [()] * len(ExitRow._fields)
        owners, joins, depths, flags, modes, layers, sources = columns
        numbers = owners, joins, depths, flags, sources
        for name, column in zip(_NUMBERS, numbers, strict=True):
            arrays[name][:count] = column
        arrays["measures"][:count] = -1
        asks = arrays["asks"]
        asks[:, :count] = 0
        places: dict[int, list[int]] = {}
        for place, mode in enumerate(modes):
            if mode is not None:
                places.setdefault(id(mode), []).append(place)
        for own in places.values():
            mode = modes[own[0]]
            arrays["measures"][own] = MEASURES.index(mode.measure)
            arrays["shortlists"][own] = mode.shortlist or 0
            arrays["thresholds"][own] = float32_threshold(mode)
            asks[np.ix_(sorted(layers[own[0]]), own)] = 1
        self._inputs.send(turn, "asks", self._asks_bytes)

    def fetch(self, turn: int) -> None:
        """Copy the results to a twin; see ``found``."""
        self._results.fetch(turn)

    def found(self, turn: int, rows: Sequence[int]) -> list[tuple[int, float]]:
        """Where rows left, 0 for nowhere, and what they measured last, once waited for."""
        arrays: dict[str, Any] = self._results.on_host(turn)
        columns = (arrays[name][rows].tolist() for name in ("left", "values"))
        return list(zip(*columns, strict=True))

    def rules(self, rows: slice) -> ExitRules:
        """Of some rows."""
        inputs = self.inputs
        names = "measures", "thresholds", "shortlists"
        return ExitRules(*(inputs[name][rows] for name in names))

    def paths(self, rows: slice) -> RowPaths:
        """Of the first rows."""
        assert not rows.start, "owners are counted from the first row"
        names = "owners", "joins", "depths", "flags"
        return RowPaths(*(self.inputs[name][rows] for name in names))

    def progress(self, rows: Tensor | slice) -> ExitProgress:
        """Of some rows; of a slice in place."""
        results = self._results.on_device
        streaks, is_read, passed = self._counts[:, rows]
        left, values = results["left"][rows], results["values"][rows]
        return ExitProgress(left, values, self._tokens[rows], streaks, is_read, passed)

    def settle(self, rows: slice) -> None:
        """Say of the first rows where they wait, by how far the rows of the step before came."""
        left = self._results.on_device["left"]
        settle_paths(left, self.inputs["sources"][rows], self.paths(rows))

    def begin(self) -> None:
        """Forget how far the rows of an earlier step came."""
        self._results.on_device["left"].zero_()
        self._results.on_device["values"].fill_(math.nan)
        self._tokens.fill_(-1)
        self._counts.zero_()


def float32_threshold(mode: EarlyExit) -> float:
    """The float32 number that decides about float32 numbers as the mode's threshold does."""
    assert mode.threshold is not None, "the intake replaces what is calibrated by its threshold"
    exact, near = mode.threshold, np.float32(mode.threshold)
    if mode.measure == "entropy":
        is_beyond, towards = float(near) > exact, -np.inf
    else:
        is_beyond, towards = float(near) < exact, np.inf
    return float(np.nextafter(near, np.float32(towards))) if is_beyond else float(near)
