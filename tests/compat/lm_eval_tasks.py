"""Three small tasks for lm-evaluation-harness, on files of our own."""

import json
from pathlib import Path

QUESTIONS = (
    {"query": "The sun rises in the", "choices": [" east", " sea of trouble"], "gold": 0},
    {"query": "She opened the", "choices": [" door", " letter.", " of"], "gold": 1},
    {"query": "A dog has four ", "choices": ["legs", "apples and a house"], "gold": 0},
    {"query": "", "choices": ["Once upon a time", "The the the"], "gold": 0},
)
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        # longer than the demo model reads at once
        "doc_to_target": "{{(query ~ choices[gold] ~ '. ') * 80}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "tiny_generation": {
        "output_type": "generate_until",
        "doc_to_text": "Then {{query}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": [",", "\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """The tasks as YAML, which JSON is too, and their questions."""
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in TASKS.items():
        source = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(questions)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(source | task))
    return folder
