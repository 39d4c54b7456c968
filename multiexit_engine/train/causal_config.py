"""The choices of a causal training run, and what it tells while it runs: plain data.

It knows what choices contradict each other. It does not know how a run is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from multiexit_engine.config import VocabularyProjectionMode


@dataclass(frozen=True)
class CausalTrainingConfig:
    """Everything that decides what a training run gives.

    Attributes:
        corpus: a folder or a tar archive of .txt files.
        output: the checkpoint folder to write.
        titles: a list of the books to read and of those held out; all books when None.
        tokenizer: a tokenizer.json to use; one is trained on the training books when None.
        vocab_size: of the tokenizer, if one is trained.
        num_layers: blocks of the network.
        hidden_size: width of the network.
        num_heads: attention heads of a block.
        max_positions: longest text the network can read, in tokens.
        exit_layers: 1-based; the last layer must be listed.
        projection_mode: how exits project; one of the two shared modes.
        early_exit_weight: weight of the losses before the last layer: that of exit k is
            `early_exit_weight * k / num_layers`, that of the last layer is 1.
        block_size: tokens of a row in the last part of a run.
        first_block_size: tokens of a row before that: shorter rows train faster.
        first_block_share: how much of the run has short rows.
        batch_tokens: tokens in an optimiser step, of short rows as of long ones.
        micro_batch_tokens: tokens in one pass through the network.
        share_rows: the exits before the last divide the rows of a pass among them.
        max_steps: optimiser steps of the whole run.
        max_minutes: ends the run, with its schedule complete, even before max_steps; what
            comes before the first step (reading, tokenising, compiling) is not counted.
        matrix_learning_rate: peak rate of Muon, which steps the matrices of the blocks.
        other_learning_rate: peak rate of AdamW, which steps everything else.
        weight_decay: of the matrices of the blocks.
        warmup_steps: steps over which the rates rise.
        decay_share: part of the run, at its end, over which the rates fall to zero.
        gradient_clip: largest norm of all gradients together.
        precision: of the products; weights and optimisers are always in fp32.
        compile: compiles the network first, which takes a minute and pays on long runs.
        device: cpu, cuda, or auto for the GPU if there is one.
        seed: of the weights and of the order of the text.
        validation_blocks: how many held-out blocks to measure on at the end; all when None.
        checkpoint_every: steps between two saved states.
        resume: goes on from the last state in `output`, if there is one.
    """

    corpus: Path
    output: Path
    titles: Path | None = None
    tokenizer: Path | None = None
    vocab_size: int = 4096
    num_layers: int = 8
    hidden_size: int = 192
    num_heads: int = 3
    max_positions: int = 512
    exit_layers: tuple[int, ...] = (8, 6, 4, 2)
    projection_mode: VocabularyProjectionMode = (
        VocabularyProjectionMode.SHARED_PROJECTION_CAST_OUTPUTS
    )
    early_exit_weight: float = 0.2
    block_size: int = 512
    first_block_size: int = 256
    first_block_share: float = 0.7
    batch_tokens: int = 8192
    micro_batch_tokens: int = 8192
    share_rows: bool = True
    max_steps: int = 4000
    max_minutes: float | None = None
    matrix_learning_rate: float = 7e-3
    other_learning_rate: float = 4e-3
    weight_decay: float = 0.1
    warmup_steps: int = 60
    decay_share: float = 0.6
    gradient_clip: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    device: str = "auto"
    seed: int = 0
    validation_blocks: int | None = None
    checkpoint_every: int = 50
    resume: bool = False

    def __post_init__(self) -> None:
        if self.projection_mode is VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION:
            raise ValueError(
                "projection_mode LAYER_SPECIFIC_PROJECTION: a run from nothing trains the shared "
                "modes only; train such heads on a finished checkpoint with train_exit_heads"
            )
        if self.num_layers not in self.exit_layers:
            raise ValueError(
                f"exit_layers {self.exit_layers}: the last layer, {self.num_layers}, must be listed"
            )
        if self.batch_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"batch_tokens {self.batch_tokens}: must be a multiple of micro_batch_tokens "
                f"{self.micro_batch_tokens}"
            )
        for name in ("first_block_size", "block_size"):
            size = getattr(self, name)
            if size > self.max_positions or self.micro_batch_tokens % size:
                raise ValueError(
                    f"{name} {size}: at most max_positions, {self.max_positions}, and a divisor of "
                    f"micro_batch_tokens, {self.micro_batch_tokens}"
                )


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands, for whoever shows it."""

    step: int
    share_done: float
    tokens_per_second: float
    losses: dict[int, float]
