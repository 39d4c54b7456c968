"""Thresholds of early exits that were measured for a model: a JSON file beside its weights.

Knows the file; nothing of how a threshold is found or used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from multiexit_engine.errors import CheckpointError
from multiexit_engine.modes import EarlyExit

FILE_NAME = "early_exits.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold, and what it was found to keep.

    Attributes:
        measure: of ``EarlyExit``.
        layers: the exits that may be taken, ascending.
        shortlist: of ``EarlyExit``.
        agreement: share of tokens that are those of full depth, at least.
        confidence: of that statement.
        threshold: the laxest that was accepted.
        found_agreement: the share in the text that it was found on.
        mean_layer: at which tokens left there.
        num_windows: independent stretches of that text.
        num_tokens: tokens measured in them.
        kv: of ``EarlyExit``.
        probes: tells the probes that were asked from others; None for other measures.
    """

    measure: str
    layers: tuple[int, ...]
    shortlist: int | None
    agreement: float
    confidence: float
    threshold: float
    found_agreement: float
    mean_layer: float
    num_windows: int
    num_tokens: int
    kv: str = "recompute"
    probes: str | None = None

    def fits(self, mode: EarlyExit, layers: tuple[int, ...], probes: str | None) -> bool:
        """Whether it is what a mode with ``calibrated`` asks for.

        Args:
            mode: that asks.
            layers: its exits.
            probes: tells the model's probes at these exits from others, where it asks them.
        """
        return (
            self.measure == mode.measure
            and self.kv == mode.kv
            and self.probes == probes
            and self.layers == layers
            and self.shortlist == mode.shortlist
            and self.agreement == mode.calibrated
        )


def read_calibrations(folder: Path) -> list[Calibration]:
    """All thresholds beside a model; none where there is no file.

    Raises:
        CheckpointError: the file is not what ``write_calibration`` writes.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    try:
        found = [Calibration(**item) for item in json.loads(path.read_text("utf-8"))]
        return [replace(item, layers=tuple(item.layers)) for item in found]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; run `multiexit calibrate` again") from error


def write_calibration(folder: Path, found: Calibration) -> Path:
    """Put a threshold beside a model, in the place of an older one for the same question."""
    kept = [item for item in read_calibrations(folder) if _question(item) != _question(found)]
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines([*kept, found]), "utf-8")
    return path


def _question(item: Calibration) -> tuple[object, ...]:
    return item.measure, item.layers, item.shortlist, item.agreement, item.kv


def _lines(items: Iterable[Calibration]) -> str:
    return "[\n" + ",\n".join(json.dumps(asdict(item)) for item in items) + "\n]\n"
