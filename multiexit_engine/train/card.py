"""Writes what was measured of the demo model as its model card and as a page of the docs.

It knows the figures' names and Markdown. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multiexit_engine.train.corpus import Title

Figures = dict[str, Any]

_FRONT_MATTER = """---
license: apache-2.0
language: en
library_name: multiexit-engine
pipeline_tag: text-generation
tags: [early-exit, multi-exit, contrastive-decoding]
---
"""


def model_card(
    figures: Figures, report: Figures, titles: Sequence[Title], command: str, machine: str
) -> str:
    """The README.md of the shipped folder."""
    return "\n".join(
        [
            _FRONT_MATTER,
            "# demo: a small GPT-2 with exits",
            "",
            f"A GPT-2 of {report['num_parameters'] / 1e6:.1f} M parameters with an exit on every "
            "second layer, trained from nothing on old English fiction. It exists to show and to "
            "test decoding modes; it knows nothing and makes things up.",
            "",
            "## Figures on held-out books",
            "",
            *exit_table(figures),
            "",
            *contrast_table(figures),
            "",
            f"Perplexity is per token of the model's own tokenizer ({_bytes_per_token(report):.2f} "
            "bytes a token), over whole books in blocks of "
            f"{figures['tokens_per_block']} tokens; that of contrast over a sample of "
            f"{figures['contrast_blocks']} blocks. Repetition is the share of trigrams of a "
            "greedy continuation that stood in it before.",
            "",
            "## Recipe",
            "",
            f"    {command}",
            "",
            f"{report['steps']} steps, {report['tokens'] / 1e6:.1f} M tokens, on {machine}. The "
            "loss is that of the last layer plus those of the earlier exits, weighted "
            "0.05, 0.10 and 0.15 from the shallowest; the exits' matrices are trained with the "
            "model (SHARED_PROJECTION_CAST_OUTPUTS).",
            "",
            "## Text and its rights",
            "",
            f"{sum(not title.held_out for title in titles)} books in English, each first published "
            "in 1929 or earlier and so in the public domain in the United States; a few are still "
            "protected in other countries. Translations and compilations of uncertain date were "
            "left out. The list with authors and years is `multiexit_engine/train/"
            "demo_corpus.tsv`; the texts themselves are not part of the package. The weights are "
            "under the licence of the package.",
            "",
            "Never trained on: "
            + "; ".join(
                f"{title.author}, *{title.title}* ({title.year})"
                for title in titles
                if title.held_out
            )
            + ".",
            "",
        ]
    )


def docs_page(figures: Figures, report: Figures, command: str, machine: str) -> str:
    """The page docs/demo-model.md."""
    return "\n".join(
        [
            "# The demo model",
            "",
            'The package ships one trained model: `Engine.from_pretrained("demo")`. It is a GPT-2 '
            f"of {report['num_parameters'] / 1e6:.1f} M parameters with exits on every second "
            "layer, small enough to be a file of the package and real enough that decoding modes "
            "differ visibly.",
            "",
            "## What its exits are worth",
            "",
            *exit_table(figures),
            "",
            "Perplexity per token and bits per byte on eight books that were never trained on; "
            "agreement is how often an exit's best token is the last layer's.",
            "",
            "## What contrast does to it",
            "",
            *contrast_table(figures),
            "",
            f"Perplexity over a sample of {figures['contrast_blocks']} blocks of those books. "
            "Repetition is the share of trigrams of a greedy continuation that stood in it before "
            f"({figures['num_prompts']} held-out prompts, {figures['new_tokens']} tokens each). "
            "Contrast takes repetition away and costs likelihood: it is for writing, not for "
            "scoring.",
            "",
            "## One prompt, greedy, in each mode",
            "",
            *continuation_list(figures),
            "",
            "## How it was made",
            "",
            f"    {command}",
            "",
            f"The script reads the books listed in `multiexit_engine/train/demo_corpus.tsv` from "
            "an archive or a folder of text files (not part of the repository), trains the "
            "tokenizer and the model, measures it, and writes the model card and this page. "
            f"The shipped weights took {report['steps']} steps of 8192 tokens on {machine}.",
            "",
            "The exits have matrices of their own in front of the shared head. On the same "
            "weights, reading the exits without them (SHARED_PROJECTION_DIRECT) gives "
            + ", ".join(
                f"{exit['perplexity']:.1f} at layer {exit['layer']}"
                for exit in figures["exits_without_matrices"][:-1]
            )
            + ".",
            "",
        ]
    )


def exit_table(figures: Figures) -> list[str]:
    """One row for each exit."""
    rows = [
        "| exit layer | perplexity | bits per byte | agreement with the last | repetition |",
        "|---:|---:|---:|---:|---:|",
    ]
    for figure in figures["exits"]:
        repetition = figures["trigram_repetition"][f"exit {figure['layer']}"]
        rows.append(
            f"| {figure['layer']} | {figure['perplexity']:.1f} | {figure['bits_per_byte']:.3f} "
            f"| {figure['agreement']:.2f} | {repetition:.2f} |"
        )
    return rows


def contrast_table(figures: Figures) -> list[str]:
    """One row for each pair of exits that was contrasted."""
    rows = ["| contrast (alpha 0.1) | perplexity | repetition |", "|---|---:|---:|"]
    for pair, perplexity in figures["contrast_perplexity"].items():
        repetition = figures["trigram_repetition"][f"contrast {pair}"]
        rows.append(f"| {pair} | {perplexity:.1f} | {repetition:.2f} |")
    return rows


def continuation_list(figures: Figures) -> list[str]:
    """The same prompt continued in each mode, the prompt itself first."""
    lines = [f"Prompt: {_one_line(figures['prompt'])}", ""]
    for mode, text in figures["continuations"].items():
        lines.append(f"- **{mode}**: {_one_line(text)}")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _bytes_per_token(report: Figures) -> float:
    return float(report["validation_bytes"] / report["validation_tokens"])
