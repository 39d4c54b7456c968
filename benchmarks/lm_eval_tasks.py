"""Accuracy of decoding modes on LAMBADA, ARC, PIQA and HellaSwag, by lm-evaluation-harness.

    python -m benchmarks.lm_eval_tasks FOLDER [--limit 500] [--mode original ...]

FOLDER holds the data, which is not part of this project: ``lambada_openai.jsonl`` (fields context
and continuation), ``arc_easy.jsonl``, ``arc_challenge.jsonl`` and ``piqa.jsonl`` (query, choices,
gold), and ``hellaswag_val_full.txt.bz2`` (six lines each: context, gold, four endings). Prompts are
those of lm-eval's own tasks of these names, zero-shot. Mode ``hf`` is lm-eval's own model of that
name beside them, which should get the figures of ``original``.
"""

from __future__ import annotations

import argparse
import bz2
import json
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import multiexit_engine.compat.lm_eval  # noqa: F401  its import registers the model
from multiexit_engine import Engine

ROW = "{:<14}" + "{:>24}" * 7 + "{:>6}"
COLUMNS = (
    ("lambada", "acc"),
    ("lambada", "perplexity"),
    ("arc_easy", "acc"),
    ("arc_challenge", "acc_norm"),
    ("piqa", "acc"),
    ("hellaswag", "acc"),
    ("hellaswag", "acc_norm"),
)


def main() -> None:
    """Measure and print one row for each mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mode", nargs="+", default=["original", "exit:6", "contrast:8;4"])
    parser.add_argument("--limit", type=int, default=500, help="first questions of each task")
    given = parser.parse_args()
    print(ROW.format("mode", *(f"{task} {metric}" for task, metric in COLUMNS), "s"))
    with tempfile.TemporaryDirectory() as scratch:
        tasks = TaskManager(
            include_path=str(write_tasks(given.folder, Path(scratch))), include_defaults=False
        )
        for mode in given.mode:
            start = time.perf_counter()
            results = simple_evaluate(
                *_model(given.model, mode),
                tasks=list(dict.fromkeys(task for task, _ in COLUMNS)),
                task_manager=tasks,
                limit=given.limit,
                bootstrap_iters=0,
                device="cpu",
            )["results"]
            figures = [f"{results[task][f'{metric},none']:.3f}" for task, metric in COLUMNS]
            print(ROW.format(mode, *figures, f"{time.perf_counter() - start:.0f}"), flush=True)


def _model(model: str, mode: str) -> tuple[str, dict[str, Any]]:
    """lm-eval's name of a model, and its arguments."""
    if mode == "hf":
        folder = files("multiexit_engine") / "assets" / "demo" if model == "demo" else model
        # what this engine reads at most; 512 positions hold one token more for hf
        length = Engine.from_pretrained(model, device="cpu").config.max_model_len - 1
        return "hf", {"pretrained": str(folder), "dtype": "float32", "max_length": length}
    return "multiexit", {"pretrained": model, "decoding": mode, "dtype": "float32"}


def write_tasks(data: Path, folder: Path) -> Path:
    """Task files of lm-eval for the files in ``data``."""
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    lambada = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' ~ continuation}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    answer = {"doc_to_text": "{{query}}\nAnswer:"}
    # the data's PIQA questions end with the line's end already
    piqa = {"doc_to_text": "{{query}}Answer:"}
    endings = {"doc_to_text": "{{query}}"}
    hellaswag = folder / "hellaswag.jsonl"
    with hellaswag.open("w") as file:
        file.writelines(json.dumps(item) + "\n" for item in _hellaswag(data))
    _write(folder, "lambada", data / "lambada_openai.jsonl", lambada)
    _write(folder, "arc_easy", data / "arc_easy.jsonl", choice | answer)
    _write(folder, "arc_challenge", data / "arc_challenge.jsonl", choice | answer)
    _write(folder, "piqa", data / "piqa.jsonl", choice | piqa)
    _write(folder, "hellaswag", hellaswag, choice | endings)
    return folder


def _write(folder: Path, name: str, data: Path, task: dict[str, Any]) -> None:
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(json.dumps(source | task))


def _hellaswag(data: Path) -> Iterator[dict[str, Any]]:
    with bz2.open(data / "hellaswag_val_full.txt.bz2", "rt") as file:
        lines = map(str.rstrip, file)
        for context, gold, *endings in zip(*[lines] * 6, strict=True):
            yield {"query": context, "gold": int(gold), "choices": endings}


if __name__ == "__main__":
    main()
