"""Bars of latency or throughput results, for the docs.

``python benchmarks/plot.py docs/latency.png results/latency-peers-gpt-neo-125m.json ...``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes

LEFT_OUT = "first token"
OURS, OTHERS, FLOOR = "#2b6cb0", "#a0aec0", "#c05621"


def main(picture: Path, results: list[Path]) -> None:
    """Draw a line of panels for each model size, one panel for each type of weights.

    A dashed line is what the bytes of plain decoding allow, where a result tells it.
    """
    rows = [row for path in results for row in json.loads(path.read_text())["results"]]
    rows = [row for row in rows if LEFT_OUT not in row["way"]]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    size = (4.8 * len(kinds), 3.1 * len(shapes))
    figure, panels = plt.subplots(len(shapes), len(kinds), figsize=size, squeeze=False)
    for shape, line in zip(shapes, panels, strict=True):
        for weights, panel in zip(kinds, line, strict=True):
            shown = [row for row in rows if (row["shape"], row["weights"]) == (shape, weights)]
            if not shown:
                panel.axis("off")
                continue
            _draw(panel, shown[::-1])
            panel.set_title(f"{shape}, {weights}, tokens/s", fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def _draw(panel: Axes, rows: list[dict[str, Any]]) -> None:
    names = [row["way"] for row in rows]
    colours = [OURS if name.startswith("engine") else OTHERS for name in names]
    bars = panel.barh(names, [row["tokens_per_s"] for row in rows], color=colours)
    panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    for row in rows:
        if row["way"] == "engine Original" and "floor_tokens_per_s" in row:
            panel.axvline(row["floor_tokens_per_s"], color=FLOOR, linestyle="--", linewidth=1)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.15)


if __name__ == "__main__":
    typer.run(main)
