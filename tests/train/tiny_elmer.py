"""A tiny ELMER run and pairs of sentences that its tests share."""

import random
from pathlib import Path

import torch

from multiexit_engine.train.elmer_config import ElmerTrainingConfig
from multiexit_engine.train.elmer_network import ElmerNetwork, ElmerShape, initialise

_OLD = ("thou", "hath", "unto", "the", "sea", "spake", "king", "and", "behold", "went")
_NEW = ("you", "has", "to", "the", "sea", "said", "king", "and", "see", "went")


def write_verses(path: Path, num_pairs: int = 60) -> Path:
    """Sentences of old words and the same sentences in new ones, as tab-separated lines."""
    chooser = random.Random(3)
    lines = []
    for _ in range(num_pairs):
        places = [chooser.randrange(len(_OLD)) for _ in range(chooser.randint(3, 9))]
        lines.append("\t".join(" ".join(words[p] for p in places) for words in (_OLD, _NEW)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_elmer_training(data: Path, output: Path, **changes: object) -> ElmerTrainingConfig:
    fields: dict[str, object] = {
        "data": (data,),
        "output": output,
        "vocab_size": 300,
        "hidden_size": 32,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "num_heads": 2,
        "mlp_size": 48,
        "max_tokens": 24,
        "pretraining_steps": 4,
        "finetuning_steps": 5,
        "batch_tokens": 256,
        "warmup_steps": 2,
        "precision": "fp32",
        "device": "cpu",
        "checkpoint_every": 3,
    }
    return ElmerTrainingConfig(**(fields | changes))  # type: ignore[arg-type]


def tiny_elmer_network() -> ElmerNetwork:
    torch.manual_seed(11)
    network = ElmerNetwork(
        ElmerShape(
            vocab_size=41,
            d_model=16,
            encoder_layers=1,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=16,
        )
    )
    initialise(network, std=0.3)
    return network
