"""Trains a small multi-exit GPT-2 from text: the loop, its clock, its checkpoints.

It knows one network and one stream of tokens on one device. It does not know the engine, and it
does not know which books it reads.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.train.corpus import (
    END_OF_TEXT,
    BlockSampler,
    encode_texts,
    fixed_blocks,
    read_books,
    read_titles,
    train_tokenizer,
)
from multiexit_engine.train.exits import MultiExitNetwork, exit_loss_weights
from multiexit_engine.train.folder import write_folder
from multiexit_engine.train.measure import ExitFigures, measure_exits
from multiexit_engine.train.optimizers import RateSchedule, causal_optimizers

logger = logging.getLogger(__name__)

_STATE_FILE = "training_state.pt"
_REPORT_FILE = "training_report.json"
_LOG_EVERY_STEPS = 20
_CAUSAL_ATTENTION = "multiexit_causal_sdpa"


@dataclass(frozen=True)
class CausalTrainingConfig:
    """Everything that decides what a training run gives.

    Attributes:
        corpus: a folder or a tar archive of .txt files.
        output: the checkpoint folder to write.
        titles: a list of the books to read and of those held out; all books when None.
        tokenizer: a tokenizer.json to use; one is trained on the training books when None.
        early_exit_weight: weight of the losses before the last layer: that of exit k is
            `early_exit_weight * k / num_layers`, that of the last layer is 1.
        batch_size: blocks in an optimiser step; must be a multiple of micro_batch_size.
        max_minutes: ends the run, with its schedule complete, even before max_steps; what
            comes before the first step (reading, tokenising, compiling) is not counted.
        resume: goes on from the last state in `output`, if there is one.
    """

    corpus: Path
    output: Path
    titles: Path | None = None
    tokenizer: Path | None = None
    vocab_size: int = 4096
    num_layers: int = 10
    hidden_size: int = 320
    num_heads: int = 5
    max_positions: int = 1024
    exit_layers: tuple[int, ...] = (10, 8, 6, 4, 2)
    projection_mode: VocabularyProjectionMode = (
        VocabularyProjectionMode.SHARED_PROJECTION_CAST_OUTPUTS
    )
    early_exit_weight: float = 0.2
    block_size: int = 1024
    batch_size: int = 128
    micro_batch_size: int = 128
    max_steps: int = 3000
    max_minutes: float | None = None
    matrix_learning_rate: float = 5e-3
    other_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 60
    decay_share: float = 0.6
    gradient_clip: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    device: str = "auto"
    seed: int = 0
    validation_blocks: int | None = None
    checkpoint_every: int = 500
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
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size}: must be a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.block_size > self.max_positions:
            raise ValueError(
                f"block_size {self.block_size}: at most max_positions, {self.max_positions}"
            )


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands, for whoever shows it."""

    step: int
    share_done: float
    tokens_per_second: float
    losses: dict[int, float]


@dataclass(frozen=True)
class TrainingReport:
    """What a finished run gave; also written to training_report.json beside the model."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    num_parameters: int
    training_tokens: int
    validation_tokens: int
    validation_bytes: int
    exits: list[ExitFigures]


@dataclass(frozen=True)
class _Data:
    tokenizer: Tokenizer
    training: Tensor
    validation: Tensor
    validation_bytes: int


def train_causal(
    config: CausalTrainingConfig,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingReport:
    """Trains from nothing, writes the checkpoint folder and returns the held-out figures.

    With the same config, versions and device, two runs without `max_minutes` give the same
    weights, also when one of them was interrupted and resumed.
    """
    device = _device(config.device)
    data = _prepare_data(config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    network = new_network(config, data.tokenizer).to(device)
    run = _Run(config, network, data.training.to(device))
    run.loop(on_progress)
    blocks = fixed_blocks(data.validation, config.block_size, config.validation_blocks)
    exits = measure_exits(
        network.eval(),
        blocks,
        bytes_per_token=data.validation_bytes / len(data.validation),
        rows_per_batch=config.micro_batch_size,
    )
    report = TrainingReport(
        steps=run.step,
        tokens=run.step * config.batch_size * config.block_size,
        seconds=round(run.seconds, 1),
        tokens_per_second=round(run.tokens_per_second),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        training_tokens=len(data.training),
        validation_tokens=len(data.validation),
        validation_bytes=data.validation_bytes,
        exits=exits,
    )
    write_folder(network, data.tokenizer, config.output, torch.bfloat16)
    (config.output / _REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
    (config.output / _STATE_FILE).unlink(missing_ok=True)
    return report


def new_network(config: CausalTrainingConfig, tokenizer: Tokenizer) -> MultiExitNetwork:
    """The untrained network of a config, from torch's current random state."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_layer=config.num_layers,
            n_embd=config.hidden_size,
            n_head=config.num_heads,
            n_positions=config.max_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    decoder.set_attn_implementation(_CAUSAL_ATTENTION)
    return MultiExitNetwork(decoder, config.projection_mode, config.exit_layers)


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention of whole rows without padding.

    transformers' own choice builds a mask while it is compiled, which rules out the flash kernels.
    """
    assert attention_mask is None
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_CAUSAL_ATTENTION, _causal_attention)


def _prepare_data(config: CausalTrainingConfig) -> _Data:
    titles = None if config.titles is None else read_titles(config.titles)
    books = read_books(config.corpus, titles)
    training = [book.text for book in books if not book.held_out]
    validation = [book.text for book in books if book.held_out]
    if not training or not validation:
        raise ValueError(
            f"{config.corpus}: {len(training)} training and {len(validation)} held-out books; "
            "at least one of each is needed"
        )
    if config.tokenizer is None:
        logger.info("training a tokenizer on %d books", len(training))
        tokenizer = train_tokenizer(training, config.vocab_size)
    else:
        tokenizer = Tokenizer.from_file(str(config.tokenizer))
    data = _Data(
        tokenizer=tokenizer,
        training=encode_texts(tokenizer, training),
        validation=encode_texts(tokenizer, validation),
        validation_bytes=sum(len(text.encode()) for text in validation),
    )
    logger.info("%d tokens to train on, %d held out", len(data.training), len(data.validation))
    return data


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class _Run:
    """One run's changing state: step, clock, weights and optimisers."""

    def __init__(
        self, config: CausalTrainingConfig, network: MultiExitNetwork, stream: Tensor
    ) -> None:
        self.step = 0
        self.seconds = 0.0
        self.tokens_per_second = 0.0
        self._config = config
        self._network = network
        self._device = stream.device
        self._sampler = BlockSampler(stream, config.block_size, config.batch_size, config.seed)
        self._weights = exit_loss_weights(
            network.layers, config.num_layers, config.early_exit_weight
        ).to(self._device)
        self._optimizers = causal_optimizers(
            network,
            config.matrix_learning_rate,
            config.other_learning_rate,
            config.weight_decay,
        )
        self._schedule = RateSchedule(self._optimizers, config.warmup_steps, config.decay_share)
        self._losses: Callable[[Tensor], Tensor] = network
        if config.compile:
            self._losses = torch.compile(network, dynamic=False)

    def loop(self, on_progress: Callable[[TrainingProgress], None] | None) -> None:
        """Steps until max_steps or max_minutes are used up."""
        if self._config.resume:
            self._load_state()
        self._network.train()
        if self._config.compile:
            self._compile()
        mark_step, mark_time = self.step, time.monotonic()
        before, start = self.seconds, mark_time
        while (share := self._share_done()) < 1.0:
            losses = self._train_step(share)
            self.step += 1
            now = time.monotonic()
            self.seconds = before + now - start
            if self.step % _LOG_EVERY_STEPS == 0 or self.step == self._config.max_steps:
                values = losses.tolist()
                now = time.monotonic()
                steps = self.step - mark_step
                self.tokens_per_second = (
                    steps * self._config.batch_size * self._config.block_size / (now - mark_time)
                )
                mark_step, mark_time = self.step, now
                self._report(on_progress, share, values)
            if self.step % self._config.checkpoint_every == 0:
                self._save_state()

    def _compile(self) -> None:
        logger.info("compiling")
        # transformers hooks its blocks in the first call that wants hidden states; were that call
        # compiled, the graph would break there.
        with torch.no_grad():
            self._network(torch.ones(1, 2, dtype=torch.long, device=self._device))
        self._accumulate(self._sampler.batch(0)[: self._config.micro_batch_size], scale=1.0)
        self._network.zero_grad(set_to_none=True)
        logger.info("compiled")

    def _share_done(self) -> float:
        share = self.step / self._config.max_steps
        if self._config.max_minutes is not None:
            share = max(share, self.seconds / (60.0 * self._config.max_minutes))
        return share

    def _train_step(self, share: float) -> Tensor:
        """One optimiser step; returns the losses of the exits [exits] on the device."""
        self._schedule.set(self.step, share)
        micro_batches = torch.split(self._sampler.batch(self.step), self._config.micro_batch_size)
        total = torch.zeros_like(self._weights)
        for ids in micro_batches:
            total += self._accumulate(ids, scale=1.0 / len(micro_batches))
        nn.utils.clip_grad_norm_(self._network.parameters(), self._config.gradient_clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    def _accumulate(self, ids: Tensor, scale: float) -> Tensor:
        """Adds the gradients of one micro-batch; returns its losses [exits] times `scale`."""
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"
        ):
            losses = self._losses(ids) * scale
        torch.autograd.backward(losses @ self._weights)
        return losses.detach()

    def _report(
        self,
        on_progress: Callable[[TrainingProgress], None] | None,
        share: float,
        values: list[float],
    ) -> None:
        losses = dict(zip(self._network.layers, values, strict=True))
        logger.info(
            "step %d, %.1f %%, %.0f tokens/s, losses %s",
            self.step,
            100 * share,
            self.tokens_per_second,
            " ".join(f"{layer}:{loss:.3f}" for layer, loss in losses.items()),
        )
        if on_progress is not None:
            on_progress(TrainingProgress(self.step, share, self.tokens_per_second, losses))

    def _save_state(self) -> None:
        self._config.output.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "network": self._network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        # A run may be killed while it writes: the last whole state must survive that.
        partial = self._config.output / f"{_STATE_FILE}.partial"
        torch.save(state, partial)
        partial.replace(self._config.output / _STATE_FILE)

    def _load_state(self) -> None:
        path = self._config.output / _STATE_FILE
        if not path.exists():
            return
        state = torch.load(path, map_location=self._device, weights_only=True)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self._network.load_state_dict(state["network"])
        for optimizer, optimizer_state in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        logger.info("resumed at step %d", self.step)
