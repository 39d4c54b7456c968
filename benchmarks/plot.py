"""Bars of a latency or throughput result, for the docs.

``python benchmarks/plot.py results/latency-native.json docs/latency.png``
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import typer

LEFT_OUT = "first token"


def main(results: Path, picture: Path) -> None:
    """Draw one panel for each model size and type of weights in a benchmark's JSON file."""
    record = json.loads(results.read_text())
    rows = [row for row in record["results"] if LEFT_OUT not in row["way"]][::-1]
    shapes = sorted({row["shape"] for row in rows})
    kinds = list(dict.fromkeys(row["weights"] for row in rows[::-1]))
    size = (4.8 * len(kinds), 2.9 * len(shapes))
    figure, panels = plt.subplots(len(shapes), len(kinds), figsize=size, squeeze=False)
    for shape, line in zip(shapes, panels, strict=True):
        for weights, panel in zip(kinds, line, strict=True):
            shown = [row for row in rows if (row["shape"], row["weights"]) == (shape, weights)]
            names = [row["way"] for row in shown]
            colours = ["#2b6cb0" if name.startswith("engine") else "#a0aec0" for name in names]
            bars = panel.barh(names, [row["tokens_per_s"] for row in shown], color=colours)
            panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
            panel.set_title(f"{shape}, {weights}, tokens/s", fontsize=10)
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    typer.run(main)
