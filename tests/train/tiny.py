"""Tiny networks and texts that the tests of training share."""

import random
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.train.causal_config import CausalTrainingConfig
from multiexit_engine.train.exits import MultiExitNetwork

LAYER_SPECIFIC = VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION
DIRECT = VocabularyProjectionMode.SHARED_PROJECTION_DIRECT
CAST = VocabularyProjectionMode.SHARED_PROJECTION_CAST_OUTPUTS

_WORDS = (
    "the",
    "a",
    "old",
    "sea",
    "ship",
    "sailed",
    "home",
    "slowly",
    "under",
    "grey",
    "and",
    "sang",
)


def tiny_decoder(vocab_size: int = 67, num_layers: int = 4) -> GPT2LMHeadModel:
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_layer=num_layers,
        n_embd=32,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_network(mode: VocabularyProjectionMode, layers: tuple[int, ...]) -> MultiExitNetwork:
    network = MultiExitNetwork(tiny_decoder(), mode, layers)
    generator = torch.Generator().manual_seed(7)
    for weight in network.heads.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return network.eval()


def write_books(folder: Path, num_books: int = 3, num_words: int = 1500) -> Path:
    folder.mkdir()
    for number in range(num_books):
        chooser = random.Random(number)
        words = " ".join(chooser.choice(_WORDS) for _ in range(num_words))
        (folder / f"book_{number}.txt").write_text(words, encoding="utf-8")
    return folder


def tiny_training(corpus: Path, output: Path, **changes: object) -> CausalTrainingConfig:
    fields: dict[str, object] = {
        "corpus": corpus,
        "output": output,
        "vocab_size": 300,
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "max_positions": 64,
        "exit_layers": (4, 2),
        "block_size": 64,
        "first_block_size": 32,
        "first_block_share": 0.5,
        "batch_tokens": 256,
        "micro_batch_tokens": 128,
        "max_steps": 6,
        "warmup_steps": 2,
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "checkpoint_every": 2,
    }
    return CausalTrainingConfig(**(fields | changes))  # type: ignore[arg-type]
