"""What early exits cost and save ELMER: BLEU against the mean exit layer, over thresholds.

python benchmarks/elmer_exits.py FOLDER/kjv-bbe.test.tsv --picture docs/elmer-exits.png
python benchmarks/elmer_exits.py FOLDER/kjv-bbe.test.tsv --chance 0.25

The package's demo-elmer on verses that it was not trained on, through the engine. Its figures are
the same on any machine but for rounding; no times are taken.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
from report import show, write_json

from multiexit_engine import Engine, Parallel
from multiexit_engine.train.elmer_data import Pair, read_pairs
from multiexit_engine.train.elmer_measure import corpus_bleu

LENGTH_RATIO = 1.1
MOST_TOKENS = 40
SWEEPS = {
    "entropy": (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    "max_prob": (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One mode's answers.

    Attributes:
        mean_exit: layer, over all tokens up to the end.
        rows: that ran a decoder layer, for each position of the answers.
        tests: of the whole head, for each position of the answers.
        gate_chance: the least chance at which probes let a position be tested; None: all are.
    """

    exit: str
    measure: str | None
    threshold: float | None
    bleu: float
    mean_exit: float
    rows: float
    tests: float
    gate_chance: float | None


def main() -> None:
    """Parse the options, measure, show and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path, help="lines of source, tab, target")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chance", type=float, help="ask probes which tests are worth making")
    options = parser.parse_args()
    engine = Engine.from_pretrained("demo-elmer", dtype="float32")
    pairs = [pair for pair in read_pairs([options.pairs]) if is_short(engine, pair)]
    points = [measured(engine, pairs, mode) for mode in modes(options.chance)]
    show(
        f"{len(pairs)} texts",
        ["exit", "threshold", "BLEU", "mean exit layer", "layers run", "tests"],
        [
            [p.measure or p.exit, "" if p.threshold is None else f"{p.threshold:g}",
             f"{p.bleu:.1f}", f"{p.mean_exit:.2f}", f"{p.rows:.2f}", f"{p.tests:.2f}"]
            for p in points
        ],
    )  # fmt: skip
    write_json(options.json, [dataclasses.asdict(p) for p in points], num_texts=len(pairs))
    if options.picture is not None:
        draw(points, options.picture)


def is_short(engine: Engine, pair: Pair) -> bool:
    """Whether both sides are of lengths that the model was trained on."""
    return all(len(engine.tokenizer.encode(text)) <= MOST_TOKENS for text in pair)


def modes(chance: float | None) -> list[Parallel]:
    """All layers, with and without feedback, and the sweeps of both measures."""
    plain = [Parallel("none", length=LENGTH_RATIO), Parallel("soft", length=LENGTH_RATIO)]
    return plain + [
        Parallel("confidence", measure, threshold, length=LENGTH_RATIO, gate_chance=chance)
        for measure, thresholds in SWEEPS.items()
        for threshold in thresholds
    ]


def measured(engine: Engine, pairs: list[Pair], mode: Parallel) -> Point:
    """One mode's answers to all sources, held against the targets."""
    mode = dataclasses.replace(mode, collapse_repeats=True)
    before = engine.stats()
    answers = [o.outputs[0] for o in engine.generate([s for s, _ in pairs], decoding=mode)]
    after = engine.stats()
    layers = [layer for answer in answers for layer in answer.exit_layers]
    computed = [b - a for a, b in zip(before.rows_per_layer, after.rows_per_layer, strict=True)]
    is_swept = mode.exit == "confidence"
    return Point(
        exit=mode.exit,
        measure=mode.measure if is_swept else None,
        threshold=mode.threshold if is_swept else None,
        bleu=corpus_bleu([answer.text for answer in answers], [target for _, target in pairs]),
        mean_exit=sum(layers) / len(layers),
        rows=sum(computed) / computed[0],
        tests=(sum(after.tested_rows_per_layer) - sum(before.tested_rows_per_layer)) / computed[0],
        gate_chance=mode.gate_chance,
    )


def draw(points: list[Point], picture: Path) -> None:
    """One line for each measure, from late exits to early ones."""
    figure, panel = plt.subplots(figsize=(6.0, 3.6))
    for measure, colour in (("entropy", "#2b6cb0"), ("max_prob", "#c05621")):
        swept = [p for p in points if p.measure == measure]
        panel.plot([p.mean_exit for p in swept], [p.bleu for p in swept], "o-", color=colour,
                   markersize=4, label=measure)  # fmt: skip
        for p in swept[:: len(swept) // 3]:
            panel.annotate(f"{p.threshold:g}", (p.mean_exit, p.bleu), fontsize=7,
                           xytext=(3, 4), textcoords="offset points")  # fmt: skip
    for p, mark in zip((p for p in points if p.measure is None), "s^", strict=True):
        panel.plot(p.mean_exit, p.bleu, mark, color="#4a5568", label=p.exit)
    panel.set_xlabel("mean exit layer")
    panel.set_ylabel("BLEU")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
