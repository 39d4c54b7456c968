"""Draws bytes per second of each op and of whole decode steps against the measured ceiling.

python benchmarks/roofline.py cpu_ops.json latency.json docs/roofline.png

Reads what ``cpu_ops.py --json`` and ``latency.py --json`` wrote. Every bar has a mark of its own:
the plain read that was measured in the same run as the bar.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import typer

LEFT_OUT = ("plain read", "PyTorch linear, 2 rows", "PyTorch linear, 16 rows")
COLOURS = {"step": "#2b6cb0", "op": "#63b3ed", "PyTorch": "#a0aec0"}


@dataclass(frozen=True)
class Bar:
    """What was reached, and the ceiling of the same run, in GB/s."""

    name: str
    kind: str
    reached: float
    ceiling: float


def op_bars(rows: list[dict[str, Any]]) -> dict[str, list[Bar]]:
    """Bars of ``cpu_ops.py``'s rows, by type of weights."""
    ceilings = {row["dtype"]: row["gb_per_s"] for row in rows if row["op"] == "plain read"}
    bars: dict[str, list[Bar]] = {dtype: [] for dtype in ceilings}
    for row in rows:
        if row["op"] not in LEFT_OUT:
            kind = "PyTorch" if row["op"].startswith("PyTorch") else "op"
            dtype = row["dtype"]
            bars[dtype].append(Bar(row["op"], kind, row["gb_per_s"], ceilings[dtype]))
    return bars


def step_bars(rows: list[dict[str, Any]]) -> dict[str, list[Bar]]:
    """Bars of whole decode steps of ``latency.py``'s rows, by type of weights."""
    bars: dict[str, list[Bar]] = {}
    for row in rows:
        if "share_of_read" in row:
            ceiling = row["read_gb_per_s"]
            reached = row["share_of_read"] * ceiling
            bar = Bar(f"decode step, {row['shape']}", "step", reached, ceiling)
            bars.setdefault(row["weights"], []).append(bar)
    return bars


def main(ops: Path, latency: Path, picture: Path) -> None:
    """Draw one panel for each type of weights."""
    of_ops = op_bars(json.loads(ops.read_text())["results"])
    of_steps = step_bars(json.loads(latency.read_text())["results"])
    panels = {kind: of_steps.get(kind, []) + bars for kind, bars in of_ops.items()}
    tallest = max(map(len, panels.values()))
    size = (5.5 * len(panels), 0.9 + 0.26 * tallest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for panel, (weights, bars) in zip(axes[0], panels.items(), strict=True):
        bars = bars[::-1]
        names = [bar.name for bar in bars]
        colours = [COLOURS[bar.kind] for bar in bars]
        drawn = panel.barh(names, [bar.reached for bar in bars], color=colours)
        panel.bar_label(drawn, fmt="%.0f", label_type="center", color="white", fontsize=8)
        ceilings = [bar.ceiling for bar in bars]
        panel.scatter(ceilings, names, marker="|", s=120, color="#c53030", zorder=3)
        panel.set_title(f"{weights}: GB/s; red: plain read of the same run", fontsize=10)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.1, y=0.01)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    typer.run(main)
