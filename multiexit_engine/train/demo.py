"""The recipe of the model that ships as "demo": `python -m multiexit_engine.train.demo --help`.

It knows the chosen size, the list of books and the figures that the model card states.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer

from multiexit_engine.train.causal import train_causal
from multiexit_engine.train.causal_config import CausalTrainingConfig
from multiexit_engine.train.corpus import (
    DEMO_TITLES,
    encode_texts,
    fixed_blocks,
    read_books,
    read_titles,
)
from multiexit_engine.train.folder import read_network
from multiexit_engine.train.measure import contrast_perplexity, measure_exits
from multiexit_engine.train.samples import (
    contrast_scores,
    exit_scores,
    greedy_continuations,
    repetition,
)

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 512
PROMPT_TOKENS = 32
NEW_TOKENS = 128
NUM_PROMPTS = 32


def demo_config(corpus: Path, output: Path) -> CausalTrainingConfig:
    """The config the shipped model was trained with, less its time limit."""
    return CausalTrainingConfig(corpus=corpus, output=output, titles=DEMO_TITLES)


def describe(folder: Path, corpus: Path, validation_blocks: int | None = None) -> dict[str, object]:
    """Held-out figures of a finished folder, as it ships: exits, contrast and repetition."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = read_network(folder).to(device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [book.text for book in read_books(corpus, read_titles(DEMO_TITLES)) if book.held_out]
    stream = encode_texts(tokenizer, texts)
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(stream)
    blocks = fixed_blocks(stream, MEASURED_TOKENS, validation_blocks)
    last = network.heads.num_layers
    modes = {f"exit {layer}": exit_scores(layer) for layer in network.layers}
    modes |= {
        f"contrast {last},{layer}": contrast_scores(last, layer)
        for layer in network.layers
        if layer < last
    }
    starts = torch.linspace(0, len(stream) - PROMPT_TOKENS - 1, NUM_PROMPTS).long()
    prompts = stream[starts[:, None] + torch.arange(PROMPT_TOKENS)].long().to(device)
    continuations = {
        name: greedy_continuations(network, prompts, scores, NEW_TOKENS)
        for name, scores in modes.items()
    }
    return {
        "exits": [
            dataclasses.asdict(figures)
            for figures in measure_exits(network, blocks, bytes_per_token)
        ],
        "contrast_perplexity": {
            f"{last},{layer}": contrast_perplexity(network, blocks[:128], last, layer)
            for layer in network.layers
            if layer < last
        },
        "trigram_repetition": {
            name: repetition(ids[:, PROMPT_TOKENS:]) for name, ids in continuations.items()
        },
        "continuations": {
            name: [tokenizer.decode(row) for row in ids[:4].tolist()]
            for name, ids in continuations.items()
        },
    }


def main() -> None:
    """Trains the demo model, then writes what it measures beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="archive or folder of the books")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use as it is")
    parser.add_argument("--max-steps", type=int, default=4000, help="steps of 8192 tokens")
    parser.add_argument("--max-minutes", type=float, help="ends the training, schedule complete")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = dataclasses.replace(
        demo_config(arguments.corpus, arguments.output),
        tokenizer=arguments.tokenizer,
        max_steps=arguments.max_steps,
        max_minutes=arguments.max_minutes,
        resume=arguments.resume,
    )
    train_causal(config)
    figures = describe(config.output, config.corpus, config.validation_blocks)
    (config.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    logger.info("figures: %s", json.dumps(figures["exits"]))


if __name__ == "__main__":
    main()
