"""Trains exit heads on a finished checkpoint whose own weights stay as they are.

It knows checkpoint folders of causal decoders and text files. It does not know how the decoder
was trained. Encoder-decoder models are out of its reach.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from multiexit_engine.checkpoint.calibration import FILE_NAME as CALIBRATIONS
from multiexit_engine.checks import is_finite, reject
from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.runtime.settings import pick_device
from multiexit_engine.train.corpus import BlockSampler, read_books
from multiexit_engine.train.exits import MultiExitNetwork
from multiexit_engine.train.optimizers import RateSchedule

logger = logging.getLogger(__name__)

_LOG_EVERY_STEPS = 20
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
# what was measured or trained for other exits says nothing of the new ones
_NOT_COPIED = (*_WEIGHT_FILES, CALIBRATIONS)


@dataclass(frozen=True)
class HeadTrainingConfig:
    """Everything that decides which heads a run gives.

    Attributes:
        checkpoint: a folder that transformers loads as a causal decoder, with its tokenizer.
        corpus: a folder or a tar archive of .txt files.
        output: the checkpoint folder to write: the decoder as it was, with exits.
        exit_layers: 1-based; a layer-specific head may also stand on the last layer. Exits that
            the checkpoint has already are left out.
        projection_mode: LAYER_SPECIFIC_PROJECTION or SHARED_PROJECTION_CAST_OUTPUTS.
        block_size: tokens of a row.
        batch_size: rows of a step.
        max_steps: optimiser steps of the whole run.
        learning_rate: peak rate of AdamW; it falls to zero over the run.
        warmup_steps: steps over which the rate rises.
        device: cpu or cuda.
        seed: of the order of the text.
    """

    checkpoint: Path
    corpus: Path
    output: Path
    exit_layers: tuple[int, ...]
    projection_mode: VocabularyProjectionMode = VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION
    block_size: int = 512
    batch_size: int = 16
    max_steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.projection_mode is VocabularyProjectionMode.SHARED_PROJECTION_DIRECT:
            raise ValueError(
                "projection_mode SHARED_PROJECTION_DIRECT: it has no weights to train; choose "
                "LAYER_SPECIFIC_PROJECTION or SHARED_PROJECTION_CAST_OUTPUTS"
            )
        if self.checkpoint.resolve() == self.output.resolve():
            raise ValueError(f"output {self.output}: must be another folder than the checkpoint")
        for name in ("block_size", "batch_size", "max_steps"):
            if getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "1 or more")
        if not is_finite(self.learning_rate) or self.learning_rate <= 0:
            raise reject("learning_rate", self.learning_rate, "a number above 0")
        if not (self.checkpoint / "config.json").is_file():
            raise ValueError(
                f"checkpoint {self.checkpoint}: must be a folder with config.json and weights; "
                "download a model of the hub first"
            )


def train_exit_heads(config: HeadTrainingConfig) -> list[dict[int, float]]:
    """Writes the checkpoint with trained heads; returns the loss of every exit at every step."""
    device = pick_device(config.device)
    decoder = cast(
        PreTrainedModel,
        AutoModelForCausalLM.from_pretrained(config.checkpoint, dtype=torch.float32),
    )
    longest = decoder.config.max_position_embeddings
    if config.block_size > longest:
        raise reject("block_size", config.block_size, f"at most the model's {longest} positions")
    network = MultiExitNetwork(decoder, config.projection_mode, config.exit_layers)
    stream = _encode_corpus(config)
    sampler = BlockSampler(stream, config.block_size, config.batch_size, config.seed)
    batches = (sampler.batch(step) for step in range(config.max_steps))
    history = fit_heads(network.to(device), batches, config)
    _write_with_heads(network, config)
    return history


def fit_heads(
    network: MultiExitNetwork, batches: Iterator[Tensor], config: HeadTrainingConfig
) -> list[dict[int, float]]:
    """Steps the heads, and only them, on the sum over exits of shifted cross entropy.

    Source: `MultiHeadModelForCausalLM.forward` of autocontrastive-gen 0.2.0.
    """
    network.requires_grad_(False)
    network.heads.requires_grad_(True)
    network.eval()
    device = network.output_weight.device
    optimizer = torch.optim.AdamW(
        network.heads.parameters(), lr=config.learning_rate, weight_decay=0.0
    )
    schedule = RateSchedule([optimizer], config.warmup_steps, decay_share=1.0)
    history = []
    for step, ids in enumerate(batches):
        schedule.set(step, step / config.max_steps)
        losses = network(ids.to(device))
        torch.autograd.backward(losses.sum())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(dict(zip(network.layers, losses.tolist(), strict=True)))
        if (step + 1) % _LOG_EVERY_STEPS == 0:
            logger.info("step %d of %d, losses %s", step + 1, config.max_steps, history[-1])
    return history


def _encode_corpus(config: HeadTrainingConfig) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(config.checkpoint)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for book in read_books(config.corpus):
        # The length warning of tokenizers is about models, and these texts are cut into blocks.
        ids += tokenizer(book.text, add_special_tokens=False, verbose=False)["input_ids"] + end
    return torch.tensor(ids, dtype=torch.int32)


def _write_with_heads(network: MultiExitNetwork, config: HeadTrainingConfig) -> None:
    """Copies the checkpoint's small files, then writes its weights and config with the exits."""
    shutil.copytree(
        config.checkpoint,
        config.output,
        ignore=shutil.ignore_patterns(*_NOT_COPIED),
        dirs_exist_ok=True,
    )
    dtype = _stored_dtype(config.checkpoint)
    save_file(
        network.checkpoint_state(dtype), config.output / "model.safetensors", {"format": "pt"}
    )
    path = config.output / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["lm_head_layer_indices"] = list(reversed(network.layers))
    content["vocab_projection_mode"] = network.heads.mode.name
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored_dtype(checkpoint: Path) -> torch.dtype:
    content = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name = content.get("dtype") or content.get("torch_dtype") or "float32"
    return cast(torch.dtype, getattr(torch, name))
