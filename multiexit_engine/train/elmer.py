"""Trains a small ELMER from pairs of sentences and writes it as a checkpoint folder.

It knows the order of the work: read, tokenise, train, measure, write. It does not know the engine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from multiexit_engine.runtime.settings import pick_device
from multiexit_engine.train.elmer_config import ElmerProgress, ElmerTrainingConfig
from multiexit_engine.train.elmer_data import (
    Pair,
    encode_source,
    encode_target,
    hold_out,
    read_pairs,
    read_tokenizer,
    train_pair_tokenizer,
)
from multiexit_engine.train.elmer_loop import ElmerLoop, EncodedPairs
from multiexit_engine.train.elmer_measure import (
    Decode,
    TextFigures,
    Written,
    confident,
    reference_length,
    softly,
    text_figures,
    without_exits,
    write,
)
from multiexit_engine.train.elmer_network import (
    BEGIN,
    END,
    PAD,
    ElmerNetwork,
    ElmerShape,
    initialise,
)
from multiexit_engine.train.literal import literal_pairs

logger = logging.getLogger(__name__)

REPORT_FILE = "training_report.json"
CONFIDENCE_NATS = 1.0
_PAIRS_WHILE_TRAINING = 200
# the modes that a report gives figures of
MODES: dict[str, Decode] = {
    "none": without_exits,
    "soft": softly,
    "confidence": confident(CONFIDENCE_NATS),
}


@dataclass(frozen=True)
class ElmerReport:
    """What a finished run gave; also written to training_report.json beside the model.

    Attributes:
        steps: optimiser steps.
        tokens: sources, targets and padding that were stepped on.
        seconds: of training.
        num_parameters: of the network.
        training_pairs: pairs that were short enough.
        validation_pairs: held-out pairs that were short enough and measured.
        copy: figures of the sources themselves taken as the answers.
        modes: figures of the modes none, soft and confidence (entropy of at most 1 nat), with as
            many positions as the reference needs.
    """

    steps: int
    tokens: int
    seconds: float
    num_parameters: int
    training_pairs: int
    validation_pairs: int
    copy: TextFigures
    modes: dict[str, TextFigures]


@dataclass(frozen=True)
class _Data:
    tokenizer: Tokenizer
    training: EncodedPairs
    validation: list[Pair]


def train_elmer(
    config: ElmerTrainingConfig,
    on_progress: Callable[[ElmerProgress], None] | None = None,
) -> ElmerReport:
    """Trains from nothing, writes the checkpoint folder and returns the held-out figures.

    With the same config, versions and device, two runs give the same weights, also when one of
    them was interrupted and resumed.

    Raises:
        ValueError: pairs that cannot be read, or none that are short enough.
        ModuleNotFoundError: the metrics' libraries are not installed.
    """
    _check_metrics()
    device = pick_device(config.device)
    data = _prepare_data(config)
    torch.manual_seed(config.seed)
    network = new_network(config, data.tokenizer).to(device)
    loop = ElmerLoop(config, network, data.tokenizer, data.training, device)

    def validate(step: int) -> None:
        pairs = data.validation[:_PAIRS_WHILE_TRAINING]
        for mode, figures in measure_modes(network, data.tokenizer, pairs).items():
            logger.info("step %d, %s: %s", step, mode, figures)
        write_elmer_folder(network, data.tokenizer, config.output, torch.bfloat16)

    loop.run(on_progress, validate)
    network.eval()
    report = ElmerReport(
        steps=loop.step,
        tokens=loop.tokens,
        seconds=round(loop.seconds, 1),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        training_pairs=len(data.training.texts),
        validation_pairs=len(data.validation),
        copy=copy_figures(data.validation),
        modes=measure_modes(network, data.tokenizer, data.validation),
    )
    write_elmer_folder(network, data.tokenizer, config.output, torch.bfloat16)
    content = json.dumps(dataclasses.asdict(report), indent=2) + "\n"
    (config.output / REPORT_FILE).write_text(content, encoding="utf-8")
    return report


def new_network(config: ElmerTrainingConfig, tokenizer: Tokenizer) -> ElmerNetwork:
    """The untrained network of a config, from torch's current random state."""
    network = ElmerNetwork(
        ElmerShape(
            vocab_size=tokenizer.get_vocab_size(),
            d_model=config.hidden_size,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.mlp_size,
            decoder_ffn_dim=config.mlp_size,
            max_position_embeddings=config.max_positions,
        )
    )
    initialise(network)
    return network


def measure_modes(
    network: ElmerNetwork, tokenizer: Tokenizer, pairs: list[Pair]
) -> dict[str, TextFigures]:
    """Figures of every mode on pairs, each with as many positions as its reference needs."""
    sources, targets = zip(*pairs, strict=True)
    return {
        mode: text_figures(
            write(network, tokenizer, sources, targets, decode, reference_length), targets
        )
        for mode, decode in MODES.items()
    }


def copy_figures(pairs: list[Pair]) -> TextFigures:
    """Figures of doing nothing: the sources as they are."""
    return text_figures(
        [Written(source, [], []) for source, _ in pairs], [target for _, target in pairs]
    )


def write_elmer_folder(
    network: ElmerNetwork, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype
) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    special = {
        "bos_token_id": BEGIN,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": END,
    }
    _write_json(
        folder / "config.json",
        {
            "model_type": "bart",
            "architectures": ["BartForConditionalGeneration"],
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "num_hidden_layers": network.shape.encoder_layers,
            **dataclasses.asdict(network.shape),
            **special,
            "dtype": str(dtype).removeprefix("torch."),
        },
    )
    _write_json(folder / "generation_config.json", special)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": network.shape.max_position_embeddings,
        },
    )


def read_elmer_network(folder: Path) -> ElmerNetwork:
    """The network of a checkpoint folder, in fp32; raises if a weight is missing or unknown."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    network = ElmerNetwork(ElmerShape.from_config(config))
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return network.eval()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _prepare_data(config: ElmerTrainingConfig) -> _Data:
    pairs, held_out = read_pairs(config.data), read_pairs(config.validation)
    if not config.validation:
        pairs, held_out = hold_out(pairs)
    if config.tokenizer is None:
        logger.info("training a tokenizer on %d pairs", len(pairs))
        texts = (text for pair in pairs for text in pair)
        tokenizer = train_pair_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = read_tokenizer(config.tokenizer)
    if config.literal_count is not None:
        pairs = literal_pairs(pairs, config.literal_count)
    training = _encode_short(tokenizer, pairs, config.max_tokens)
    validation = _encode_short(tokenizer, held_out, config.max_tokens).texts
    if not training.texts or not validation:
        raise ValueError(
            f"data: {len(training.texts)} pairs to train on and {len(validation)} to measure on "
            f"have at most {config.max_tokens} tokens a side; at least one of each is needed: "
            "raise max_tokens or give more pairs"
        )
    logger.info("%d pairs to train on, %d held out", len(training.texts), len(validation))
    return _Data(tokenizer, training, validation[: config.validation_pairs])


def _encode_short(tokenizer: Tokenizer, pairs: list[Pair], max_tokens: int) -> EncodedPairs:
    sources = encode_source(tokenizer, [source for source, _ in pairs], max_tokens + 1)
    targets = encode_target(tokenizer, [target for _, target in pairs])
    kept = [
        row
        for row in range(len(pairs))
        if len(sources[row]) <= max_tokens and len(targets[row]) <= max_tokens
    ]
    return EncodedPairs(
        [pairs[row] for row in kept], [sources[row] for row in kept], [targets[row] for row in kept]
    )


def _check_metrics() -> None:
    missing = [
        name for name in ("sacrebleu", "rouge_score") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)}: not installed, and the report needs them; "
            "pip install 'multiexit-engine[train]'"
        )
