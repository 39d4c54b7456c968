"""What tests of confidence cost where probes say which are worth making, over thresholds.

python benchmarks/nar_gates.py --model FOLDER --prepare
python benchmarks/nar_gates.py --model FOLDER --batch 1 --json benchmarks/results/nar-gates-1.json

The model is that of nar.py, of BART-base's size with random weights, its states are tested after
every layer. ``--prepare`` writes it and trains its probes on other sources of random tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from nar import ALWAYS, MASK, SOURCE_LEN, TARGET_LEN, random_bart, save
from report import alternate, median, show, timed, write_json

from multiexit_engine import Engine, Parallel, SamplingParams
from multiexit_engine.train import train_gates

NUM_TRAINING_SOURCES = 192
UNCUT = SamplingParams(ignore_eos=True)
# from those that nobody passes to those that all pass after the first layer
SWEEPS = {
    "max_prob": [0.5, 0.3, 0.2, 0.18, 0.17, 0.16, 0.15, 0.12, 0.1],
    "entropy": [7.0, 9.0, 9.2, 9.3, 9.4, 9.5, 9.8, 10.0],
}


def main() -> None:
    """Parse the options, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chance", type=float, default=0.25)
    for measure, thresholds in SWEEPS.items():
        name = "--" + measure.replace("_", "-")
        parser.add_argument(name, type=float, nargs="*", default=thresholds, help="thresholds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.prepare:
        prepare(options.model)
        return
    engine = Engine.from_pretrained(options.model, dtype="float32")
    generator = torch.Generator().manual_seed(options.batch)
    sources = torch.randint(3, MASK, (options.batch, SOURCE_LEN), generator=generator).tolist()
    modes = ways({measure: getattr(options, measure) for measure in SWEEPS}, options.chance)
    turns = {
        name: timed(lambda mode=mode: engine.generate(sources, UNCUT, mode))
        for name, mode in modes.items()
    }
    times = {name: median(found) for name, found in alternate(turns, options.rounds).items()}
    none = times["none"]
    results = [
        {"batch": options.batch, "way": name, "measure": mode.measure, "threshold": mode.threshold,
         "gate_chance": mode.gate_chance, "ms": 1e3 * times[name],
         "beside_none": times[name] / none} | exits_and_tests(engine, sources, mode)
        for name, mode in modes.items()
    ]  # fmt: skip
    show(
        f"batch {options.batch}, {options.threads} threads",
        ["way", "ms", "beside none", "mean exit layer", "tests for a position"],
        [[r["way"], f"{r['ms']:.1f}", f"{r['beside_none']:.3f}", f"{r['mean_exit']:.2f}",
          f"{r['tests']:.2f}"] for r in results],
    )  # fmt: skip
    write_json(options.json, results)


def prepare(folder: Path) -> None:
    """Write the model and its probes."""
    folder.mkdir(exist_ok=True)
    save(*random_bart(), folder)
    generator = torch.Generator().manual_seed(0)
    shape = NUM_TRAINING_SOURCES, SOURCE_LEN
    sources = torch.randint(3, MASK, shape, generator=generator).tolist()
    engine = Engine.from_pretrained(folder, dtype="float32")
    for report in train_gates(engine, sources, length_ratio=TARGET_LEN / SOURCE_LEN):
        print(report)


def ways(sweeps: dict[str, list[float]], chance: float) -> dict[str, Parallel]:
    """No tests, and for each threshold all tests and those that probes find worth making."""
    forced = Parallel("confidence", "max_prob", ALWAYS, layers=(2,), length=TARGET_LEN)
    found = {
        "none": Parallel(length=TARGET_LEN),
        "all leave at 2, all tests": forced,
        "all leave at 2, by probes": dataclasses.replace(forced, gate_chance=chance),
    }
    for measure, thresholds in sweeps.items():
        for threshold in thresholds:
            exact = Parallel("confidence", measure, threshold, length=TARGET_LEN)
            found[f"{measure} {threshold:g}, all tests"] = exact
            gated = dataclasses.replace(exact, gate_chance=chance)
            found[f"{measure} {threshold:g}, by probes"] = gated
    return found


def exits_and_tests(engine: Engine, sources: list[list[int]], mode: Parallel) -> dict[str, float]:
    """The mean exit layer, and tests for each position."""
    before = sum(engine.stats().tested_rows_per_layer)
    answers = [output.outputs[0] for output in engine.generate(sources, UNCUT, mode)]
    tests = sum(engine.stats().tested_rows_per_layer) - before
    layers = [layer for answer in answers for layer in answer.exit_layers]
    return {"mean_exit": sum(layers) / len(layers), "tests": tests / len(layers)}


if __name__ == "__main__":
    main()
