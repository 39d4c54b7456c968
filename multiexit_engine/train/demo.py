"""The recipe of the model that ships as "demo": `python -m multiexit_engine.train.demo --help`.

It knows the chosen config, the list of books and what is measured of the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer

from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.train.card import Figures, docs_page, model_card
from multiexit_engine.train.causal import train_causal
from multiexit_engine.train.causal_config import CausalTrainingConfig
from multiexit_engine.train.corpus import (
    DEMO_TITLES,
    encode_texts,
    fixed_blocks,
    read_books,
    read_titles,
)
from multiexit_engine.train.exits import MultiExitNetwork
from multiexit_engine.train.folder import read_network
from multiexit_engine.train.measure import contrast_perplexity, measure_exits
from multiexit_engine.train.samples import (
    contrast_scores,
    exit_scores,
    greedy_continuations,
    repetition,
)

logger = logging.getLogger(__name__)

TOKENS_PER_BLOCK = 512
CONTRAST_BLOCKS = 128
PROMPT_TOKENS = 32
NEW_TOKENS = 100
NUM_PROMPTS = 32
SHOWN_PROMPT = "It was a cold evening in October, and the old captain sat alone by the fire."


def demo_config(corpus: Path, output: Path) -> CausalTrainingConfig:
    """The config the shipped model was trained with, less its limits of steps and time."""
    return CausalTrainingConfig(corpus=corpus, output=output, titles=DEMO_TITLES)


def describe(folder: Path, corpus: Path) -> Figures:
    """Held-out figures of a finished folder as it is stored: exits, contrast, repetition."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = read_network(folder).to(device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [book.text for book in read_books(corpus, read_titles(DEMO_TITLES)) if book.held_out]
    stream = encode_texts(tokenizer, texts)
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(stream)
    blocks = fixed_blocks(stream, TOKENS_PER_BLOCK)
    direct = MultiExitNetwork(
        network.decoder, VocabularyProjectionMode.SHARED_PROJECTION_DIRECT, network.layers
    ).eval()
    upper, lowers = network.layers[-1], network.layers[:-1]
    modes = {f"exit {layer}": exit_scores(layer) for layer in network.layers}
    modes |= {f"contrast {upper},{layer}": contrast_scores(upper, layer) for layer in lowers}
    spread = torch.linspace(0, len(blocks) - 1, CONTRAST_BLOCKS).long()
    starts = torch.linspace(0, len(blocks) - 1, NUM_PROMPTS).long()
    prompts = blocks[starts, :PROMPT_TOKENS].to(device)
    shown = torch.tensor([tokenizer.encode(SHOWN_PROMPT).ids], device=device)
    return {
        "tokens_per_block": TOKENS_PER_BLOCK,
        "contrast_blocks": CONTRAST_BLOCKS,
        "num_prompts": NUM_PROMPTS,
        "new_tokens": NEW_TOKENS,
        "exits": _as_dicts(network, blocks, bytes_per_token),
        "exits_without_matrices": _as_dicts(direct, blocks[spread], bytes_per_token),
        "contrast_perplexity": {
            f"{upper},{layer}": contrast_perplexity(network, blocks[spread], upper, layer)
            for layer in lowers
        },
        "trigram_repetition": {
            name: repetition(
                greedy_continuations(network, prompts, scores, NEW_TOKENS)[:, PROMPT_TOKENS:]
            )
            for name, scores in modes.items()
        },
        "prompt": SHOWN_PROMPT,
        "continuations": {
            name: tokenizer.decode(
                greedy_continuations(network, shown, scores, NEW_TOKENS)[
                    0, shown.shape[1] :
                ].tolist()
            )
            for name, scores in modes.items()
        },
    }


def _as_dicts(
    network: MultiExitNetwork, blocks: torch.Tensor, bytes_per_token: float
) -> list[Figures]:
    return [
        dataclasses.asdict(figures) for figures in measure_exits(network, blocks, bytes_per_token)
    ]


def main() -> None:
    """Trains the demo model, measures it and writes its card and its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="archive or folder of the books")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--page", type=Path, help="page of the docs to write")
    parser.add_argument("--machine", default="one core", help="named in the card and on the page")
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
    report = dataclasses.asdict(train_causal(config))
    figures = describe(config.output, config.corpus)
    (config.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    command = (
        "python -m multiexit_engine.train.demo --corpus BOOKS --output FOLDER "
        f"--max-steps {report['steps']}"
    )
    titles = read_titles(DEMO_TITLES)
    card = model_card(figures, report, titles, command, arguments.machine)
    (config.output / "README.md").write_text(card, encoding="utf-8")
    if arguments.page is not None:
        page = docs_page(figures, report, command, arguments.machine)
        arguments.page.write_text(page, encoding="utf-8")
    logger.info("wrote %s", config.output)


if __name__ == "__main__":
    main()
