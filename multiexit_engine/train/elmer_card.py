"""Writes what was measured of demo-elmer as its model card and as a page of the docs.

It knows the figures' names and Markdown. It measures nothing.
"""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_FRONT_MATTER = """---
license: apache-2.0
language: en
library_name: multiexit-engine
pipeline_tag: text-generation
tags: [early-exit, non-autoregressive, elmer]
---
"""


def card(figures: Figures) -> str:
    """The README.md of the shipped folder."""
    return "\n".join(
        [
            _FRONT_MATTER,
            "# demo-elmer: a small ELMER that modernises Bible verses",
            "",
            *_introduction(figures),
            "",
            *_figures(figures),
            "",
            *_recipe(figures),
            "",
        ]
    )


def page(figures: Figures) -> str:
    """The page docs/demo-elmer.md."""
    return "\n".join(
        [
            "# demo-elmer",
            "",
            'The package ships a second trained model: `Engine.from_pretrained("demo-elmer")`. '
            + _introduction(figures)[0],
            "",
            "```python",
            "from multiexit_engine import Engine, Parallel",
            "",
            'engine = Engine.from_pretrained("demo-elmer")',
            f'mode = Parallel("confidence", threshold={figures["shown_nats"]}, '
            f"length={figures['length_ratio']}, collapse_repeats=True)",
            'verse = "And he saith unto them, Why are ye troubled?"',
            "answer = engine.generate(verse, decoding=mode)[0].outputs[0]",
            "print(answer.text, answer.exit_layers)",
            "```",
            "",
            "## What it writes",
            "",
            f"Each token with the layer it left at (entropy of at most {figures['shown_nats']} "
            f"nats; the last of {figures['num_layers']} layers takes the rest), and below it what "
            'the "soft" mode writes:',
            "",
            *_shown(figures),
            "",
            "## How good it is",
            "",
            *_figures(figures),
            "",
            "## How it was made",
            "",
            *_recipe(figures),
            "",
        ]
    )


def _introduction(figures: Figures) -> list[str]:
    return [
        f"It is an ELMER of {figures['num_parameters'] / 1e6:.1f} M parameters that turns verses "
        "of the King James Bible into plainer English. It writes all tokens of a verse at once, "
        f"and each token may leave at any of its {figures['num_layers']} decoder layers. It exists "
        "to show and to test decoding in parallel; it knows nothing but such verses."
    ]


def _figures(figures: Figures) -> list[str]:
    table = [
        "| length | exit | BLEU | ROUGE-L | mean exit layer |",
        "|---|---|---:|---:|---:|",
        f"| | the source as it is | {figures['copy']['bleu']:.1f} "
        f"| {figures['copy']['rouge_l']:.1f} | |",
    ]
    table += [
        f"| of the {row['length']} | {row['exit']} | {row['bleu']:.1f} | {row['rouge_l']:.1f} "
        f"| {row['mean_exit_layer']:.2f} |"
        for row in figures["rows"]
    ]
    return [
        *table,
        "",
        f"On the {figures['num_verses']} verses of at most {figures['max_tokens']} tokens a side "
        "among chapters that were never trained on, against the Bible in Basic English. Length "
        '"of the reference" gives the decoder as many positions as the reference has tokens, as '
        f'ELMER\'s own test does; "of the source" gives it {figures["length_ratio"]} positions for '
        "each token of the source, as somebody without a reference must. Repeated words are "
        "collapsed. BLEU by sacrebleu, ROUGE-L by rouge-score; both compare words with the one "
        "reference and are low for any text that says it otherwise.",
    ]


def _recipe(figures: Figures) -> list[str]:
    return [
        "    python -m multiexit_engine.train.elmer_demo --data FOLDER --output FOLDER "
        f"--finetuning-steps {figures['steps'] - 150}",
        "",
        f"{figures['steps']} steps of 3072 tokens on {figures['machine']}: 150 of "
        "layer-permutation pre-training (verses with words hidden, each token "
        "predicted at a layer drawn for it), "
        "then hard and soft fine-tuning in turns. The targets were made literal first "
        "(`multiexit_engine/train/literal.py`): the King James words, with those substitutions "
        "that occur at least five times among the pairs. On the translations as they are, which "
        "often say a verse quite differently, a network that writes all words at once mixes the "
        "ways to say it and stays far below the source itself.",
        "",
        *([figures["note"], ""] if figures["note"] else []),
        "The verses (King James Version and Bible in Basic English, both in the public domain, "
        "aligned by K. Carlson et al., 2018) are not part of the package; the weights are under "
        "its licence. `multiexit train elmer` trains on any file of pairs.",
    ]


def _shown(figures: Figures) -> list[str]:
    lines = []
    for each in figures["shown"]:
        tokens = "".join(
            token + str(layer).translate(_SUPERSCRIPTS)
            for token, layer in zip(each["tokens"], each["exit_layers"], strict=True)
        )
        lines += [f"- {each['source']}", f"  - {tokens.strip()}", f"  - soft: {each['soft']}"]
    return lines
