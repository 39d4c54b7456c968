"""The choices of an ELMER training run, and what it tells while it runs: plain data.

It knows what choices contradict each other. It does not know how a run is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ElmerTrainingConfig:
    """Everything that decides what a training run gives.

    A run has two parts. Pre-training repairs damaged sentences of both sides of the pairs, each
    token at a layer of its own. Fine-tuning writes targets from sources, in turns with tokens that
    leave at layers of their own (hard) and with predictions fed upward (soft), so that one
    checkpoint serves both.

    Attributes:
        data: files of pairs to train on: a line is source, tab, target.
        output: the checkpoint folder to write.
        validation: files of pairs to measure on; every fiftieth pair of `data` when none is given.
        literal_count: trains on targets made literal: sources in which substitutions stand that
            occur at least so often in the pairs; on the targets as they are when None.
        tokenizer: a tokenizer.json to use; one is trained on the pairs when None.
        vocab_size: of the tokenizer, if one is trained.
        hidden_size: width of the network.
        encoder_layers: of the network.
        decoder_layers: of the network; each is an exit.
        num_heads: attention heads of a layer.
        mlp_size: inner width of the MLPs.
        max_positions: longest source and longest target that the network can hold, in tokens.
        max_tokens: longest source and longest target, in tokens; longer pairs are left out.
        infill_share: part of the words that pre-training hides.
        full_share: part of the hard rows that stay to the last layer, unlike ELMER's (0).
        label_share: part of the soft positions that are told their label, as ELMER's.
        length_slack: in half of the rows the decoder gets up to this share of
            positions too many, so that it learns to end a text itself; ELMER's get those that
            padding happens to add.
        pretraining_steps: optimiser steps of the first part.
        finetuning_steps: optimiser steps of the second part.
        batch_tokens: tokens in an optimiser step, sources and targets together, with padding.
        matrix_learning_rate: peak rate of Muon, which steps the matrices of the layers.
        other_learning_rate: peak rate of AdamW, which steps everything else.
        weight_decay: of the matrices of the layers.
        warmup_steps: steps over which the rates rise.
        decay_share: part of the run, at its end, over which the rates fall to zero.
        gradient_clip: largest norm of all gradients together.
        precision: of the products; weights and optimisers are always in fp32.
        device: cpu, cuda, or auto for the GPU if there is one.
        seed: of the weights, the order of the pairs and all draws.
        validation_pairs: how many held-out pairs to measure on; all when None.
        validate_every: steps between two measurements while it trains.
        checkpoint_every: steps between two saved states.
        resume: goes on from the last state in `output`, if there is one.
    """

    data: tuple[Path, ...]
    output: Path
    validation: tuple[Path, ...] = ()
    literal_count: int | None = None
    tokenizer: Path | None = None
    vocab_size: int = 4096
    hidden_size: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 4
    num_heads: int = 4
    mlp_size: int = 768
    max_positions: int = 64
    max_tokens: int = 48
    infill_share: float = 0.3
    full_share: float = 0.3
    label_share: float = 0.3
    length_slack: float = 0.3
    pretraining_steps: int = 500
    finetuning_steps: int = 4000
    batch_tokens: int = 6144
    matrix_learning_rate: float = 5e-3
    other_learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    decay_share: float = 0.6
    gradient_clip: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    seed: int = 0
    validation_pairs: int | None = None
    validate_every: int = 500
    checkpoint_every: int = 50
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: no file of pairs was given; give at least one")
        if self.literal_count is not None and self.literal_count < 1:
            raise ValueError(f"literal_count {self.literal_count}: at least 1, or None")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads}: must divide hidden_size, {self.hidden_size}"
            )
        for name in ("infill_share", "full_share", "label_share"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} {share}: a share between 0 and 1")
        if self.length_slack < 0.0:
            raise ValueError(f"length_slack {self.length_slack}: 0 or more")
        if self.max_tokens + int(self.length_slack * self.max_tokens) > self.max_positions:
            raise ValueError(
                f"max_tokens {self.max_tokens}: with length_slack {self.length_slack} more than "
                f"max_positions, {self.max_positions}"
            )
        if self.batch_tokens < 2 * self.max_tokens:
            raise ValueError(
                f"batch_tokens {self.batch_tokens}: must hold a source and a target of max_tokens, "
                f"{self.max_tokens}"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of both parts."""
        return self.pretraining_steps + self.finetuning_steps


@dataclass(frozen=True)
class ElmerProgress:
    """Where a run stands, for whoever shows it; the loss is the mean since the last report."""

    step: int
    share_done: float
    part: Literal["pre-training", "hard", "soft"]
    loss: float
    tokens_per_second: float
