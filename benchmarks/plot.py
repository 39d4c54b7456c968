"""Bars of a latency or throughput result, for the docs.

``python benchmarks/plot.py results/latency-reference.json docs/latency.svg``
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import typer


def main(results: Path, picture: Path) -> None:
    """Draw one panel for each model size of a JSON file written by a benchmark."""
    record = json.loads(results.read_text())
    shapes = list(dict.fromkeys(row["shape"] for row in record["results"]))
    figure, panels = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 2.8), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        rows = [row for row in record["results"] if row["shape"] == shape][::-1]
        names = [row["way"] for row in rows]
        colours = ["#2b6cb0" if name.startswith("engine") else "#a0aec0" for name in names]
        bars = panel.barh(names, [row["tokens_per_s"] for row in rows], color=colours)
        panel.bar_label(bars, fmt="%.1f", padding=3)
        panel.set_title(f"{shape}, {rows[0]['dtype']}, tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(picture)


if __name__ == "__main__":
    typer.run(main)
