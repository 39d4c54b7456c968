"""The recipe of the model that ships as "demo-elmer".

Run as `python -m multiexit_engine.train.elmer_demo`; `--help` says what with.
It knows the chosen config, the files of verses and what is measured of the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path

import torch

from multiexit_engine.train.elmer import copy_figures, read_elmer_network, train_elmer
from multiexit_engine.train.elmer_card import Figures, card, page
from multiexit_engine.train.elmer_config import ElmerTrainingConfig
from multiexit_engine.train.elmer_data import Pair, encode_target, read_pairs, read_tokenizer
from multiexit_engine.train.elmer_measure import (
    Decode,
    Length,
    confident,
    reference_length,
    softly,
    source_length,
    text_figures,
    without_exits,
    write,
)

logger = logging.getLogger(__name__)

CONFIDENCE_NATS = (0.5, 1.0, 2.0)
LENGTH_RATIO = 1.1
SHOWN_NATS = 0.5
SHOWN = (
    "And the Lord spake unto Moses, saying, Speak unto the children of Israel.",
    "Behold, thou art fair, my love; behold, thou hast found favour in my sight.",
    "And he saith unto them, Why are ye troubled?",
    "And when he was come nigh unto the city, he sent two of his servants.",
    "Blessed is the man that feareth the Lord.",
    "Then answered Jesus and said unto him, Verily I say unto thee, ye shall see the kingdom.",
)


def demo_elmer_config(data: Path, output: Path) -> ElmerTrainingConfig:
    """The config of the shipped model, for a folder of the verses' files."""
    return ElmerTrainingConfig(
        data=(data / "kjv-bbe.train.tsv",),
        validation=(data / "kjv-bbe.dev.tsv",),
        output=output,
        literal_count=5,
        hidden_size=192,
        num_heads=3,
        mlp_size=576,
        max_tokens=40,
        batch_tokens=3072,
        pretraining_steps=150,
        finetuning_steps=2850,
    )


def describe(folder: Path, data: Path, max_tokens: int) -> Figures:
    """Figures of a finished folder as it is stored, on the test verses that are short enough."""
    network = read_elmer_network(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    pairs: list[Pair] = [
        pair
        for pair in read_pairs([data / "kjv-bbe.test.tsv"])
        if max(len(ids) for ids in encode_target(tokenizer, pair)) <= max_tokens
    ]
    sources, targets = (list(texts) for texts in zip(*pairs, strict=True))
    lengths: dict[str, Length] = {
        "reference": reference_length,
        "source": source_length(LENGTH_RATIO, network.shape.max_position_embeddings),
    }
    modes: dict[str, Decode] = {"none": without_exits, "soft": softly}
    modes |= {f"confidence, {nats} nats": confident(nats) for nats in CONFIDENCE_NATS}
    rows = [
        {"length": length_name, "exit": mode}
        | dataclasses.asdict(
            text_figures(write(network, tokenizer, sources, targets, decode, length), targets)
        )
        for length_name, length in lengths.items()
        for mode, decode in modes.items()
    ]
    by_source = lengths["source"]
    shown = write(network, tokenizer, SHOWN, SHOWN, confident(SHOWN_NATS), by_source)
    soft = write(network, tokenizer, SHOWN, SHOWN, softly, by_source)
    return {
        "num_verses": len(pairs),
        "max_tokens": max_tokens,
        "length_ratio": LENGTH_RATIO,
        "num_layers": network.shape.decoder_layers,
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "copy": dataclasses.asdict(copy_figures(pairs)),
        "rows": rows,
        "shown_nats": SHOWN_NATS,
        "shown": [
            {
                "source": source,
                "soft": by_soft.text,
                "tokens": [tokenizer.decode([token]) for token in written.ids],
                "exit_layers": written.exit_layers,
            }
            for source, written, by_soft in zip(SHOWN, shown, soft, strict=True)
        ],
    }


def main() -> None:
    """Trains the demo model, measures it and writes its card and its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of kjv-bbe.*.tsv")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--page", type=Path, help="page of the docs to write")
    parser.add_argument("--machine", default="one core", help="named in the card and on the page")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use as it is")
    parser.add_argument("--finetuning-steps", type=int, help="instead of the recipe's")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    parser.add_argument("--no-training", action="store_true", help="describe what is in the folder")
    parser.add_argument("--note", default="", help="what of the run is not the recipe's")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = demo_elmer_config(arguments.data, arguments.output)
    config = dataclasses.replace(
        config,
        finetuning_steps=arguments.finetuning_steps or config.finetuning_steps,
        tokenizer=arguments.tokenizer,
        resume=arguments.resume,
    )
    if not arguments.no_training:
        train_elmer(config)
    torch.set_grad_enabled(False)
    figures = describe(config.output, config.data[0].parent, config.max_tokens)
    figures |= {"machine": arguments.machine, "steps": config.steps, "note": arguments.note}
    (config.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (config.output / "README.md").write_text(card(figures), encoding="utf-8")
    if arguments.page is not None:
        arguments.page.write_text(page(figures), encoding="utf-8")
    logger.info("wrote %s", config.output)


if __name__ == "__main__":
    main()
