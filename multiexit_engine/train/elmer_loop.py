"""The training loop of ELMER: parts, objectives, clock, rates, saved states.

It knows one network and encoded pairs. It does not know files of pairs, nor what is measured.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from multiexit_engine.train.elmer_config import ElmerProgress, ElmerTrainingConfig
from multiexit_engine.train.elmer_data import (
    Pair,
    TokenBudgetSampler,
    damage,
    encode_source,
    make_batch,
)
from multiexit_engine.train.elmer_network import ElmerNetwork
from multiexit_engine.train.elmer_objectives import (
    PairBatch,
    draw_exit_layers,
    hard_loss,
    soft_losses,
)
from multiexit_engine.train.optimizers import RateSchedule, layer_optimizers
from multiexit_engine.train.saved_state import load_state, save_state

logger = logging.getLogger(__name__)

LOG_EVERY_STEPS = 20

Part = Literal["pre-training", "hard", "soft"]


class _Clock:
    """Seconds of training since the last restart, without those it was stopped."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def restart(self) -> float:
        """The seconds so far; they count from 0 again."""
        seconds = time.monotonic() - self._start
        self._start += seconds
        return seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        stopped_at = time.monotonic()
        yield
        self._start += time.monotonic() - stopped_at


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs to train on as texts and as ids, in one order."""

    texts: list[Pair]
    sources: list[list[int]]
    targets: list[list[int]]


class ElmerLoop:
    """One run's changing state: step, clock, weights and optimisers."""

    def __init__(
        self,
        config: ElmerTrainingConfig,
        network: ElmerNetwork,
        tokenizer: Tokenizer,
        pairs: EncodedPairs,
        device: torch.device,
    ) -> None:
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._config = config
        self._network = network
        self._tokenizer = tokenizer
        self._pairs = pairs
        self._device = device
        self._sentences = [text for pair in pairs.texts for text in pair]
        self._sentence_ids = [
            ids
            for source, target in zip(pairs.sources, pairs.targets, strict=True)
            # a source without its first token is a target
            for ids in (source[1:], target)
        ]
        self._sentence_sampler = TokenBudgetSampler(
            [2 * len(ids) for ids in self._sentence_ids], config.batch_tokens, config.seed
        )
        self._pair_sampler = TokenBudgetSampler(
            [
                len(source) + len(target)
                for source, target in zip(pairs.sources, pairs.targets, strict=True)
            ],
            config.batch_tokens,
            config.seed,
        )
        self._optimizers = layer_optimizers(
            network,
            config.matrix_learning_rate,
            config.other_learning_rate,
            config.weight_decay,
        )
        self._schedule = RateSchedule(self._optimizers, config.warmup_steps, config.decay_share)

    def run(
        self,
        on_progress: Callable[[ElmerProgress], None] | None,
        validate: Callable[[int], None] | None,
    ) -> None:
        """Steps until both parts are done; `validate` gets the step, every `validate_every`."""
        if self._config.resume:
            self._load_state()
        losses: list[Tensor] = []
        mark_tokens, clock = self.tokens, _Clock()
        while self.step < self._config.steps:
            self._network.train()
            part = self._part()
            losses.append(self._train_step(part))
            self.step += 1
            if self.step % LOG_EVERY_STEPS == 0 or self.step == self._config.steps:
                loss = float(torch.stack(losses).mean())
                seconds = clock.restart()
                self.seconds += seconds
                rate = (self.tokens - mark_tokens) / seconds
                losses, mark_tokens = [], self.tokens
                self._report(on_progress, part, loss, rate)
            if self.step % self._config.checkpoint_every == 0:
                self._save_state()
            if validate is not None and self.step % self._config.validate_every == 0:
                self._network.eval()
                with clock.stopped():
                    validate(self.step)

    def _part(self) -> Part:
        if self.step < self._config.pretraining_steps:
            return "pre-training"
        return "soft" if self.step % 2 else "hard"

    def _train_step(self, part: Part) -> Tensor:
        """One optimiser step; returns its loss on the device."""
        self._schedule.set(self.step, self.step / self._config.steps)
        # all draws of a step come from its number, so that a resumed run draws the same
        seed = self._config.seed * 1_000_003 + self.step
        generator = torch.Generator().manual_seed(seed)
        batch = self._batch(part, random.Random(seed)).to(self._device)
        self.tokens += batch.source_ids.numel() + batch.labels.numel()
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"
        ):
            loss = self._loss(part, batch, generator)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._network.parameters(), self._config.gradient_clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, part: Part, batch: PairBatch, generator: torch.Generator) -> Tensor:
        if part == "soft":
            return soft_losses(self._network, batch, self._config.label_share, generator).mean()
        rows, length = batch.labels.shape
        full_share = 0.0 if part == "pre-training" else self._config.full_share
        exit_layers = draw_exit_layers(
            (rows, length), self._network.shape.decoder_layers, full_share, generator
        )
        return hard_loss(self._network, batch, exit_layers.to(self._device))

    def _batch(self, part: Part, chooser: random.Random) -> PairBatch:
        if part == "pre-training":
            rows = self._sentence_sampler.rows(self.step)
            damaged = [
                damage(self._sentences[row], self._config.infill_share, chooser) for row in rows
            ]
            sources = encode_source(self._tokenizer, damaged, self._config.max_positions)
            targets = [self._sentence_ids[row] for row in rows]
        else:
            rows = self._pair_sampler.rows(self.step - self._config.pretraining_steps)
            sources = [self._pairs.sources[row] for row in rows]
            targets = [self._pairs.targets[row] for row in rows]
        return make_batch(sources, targets, [self._length(len(t), chooser) for t in targets])

    def _length(self, num_labels: int, chooser: random.Random) -> int:
        """Decoder positions for a target: its own, or in half of the rows some more."""
        if chooser.random() < 0.5:
            return num_labels
        return num_labels + chooser.randint(0, int(self._config.length_slack * num_labels))

    def _report(
        self,
        on_progress: Callable[[ElmerProgress], None] | None,
        part: Part,
        loss: float,
        rate: float,
    ) -> None:
        share = self.step / self._config.steps
        logger.info(
            "step %d, %.1f %%, %s, %.0f tokens/s, loss %.3f",
            self.step,
            100 * share,
            "pre-training" if part == "pre-training" else "fine-tuning",
            rate,
            loss,
        )
        if on_progress is not None:
            on_progress(ElmerProgress(self.step, share, part, loss, rate))

    def _save_state(self) -> None:
        counters = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        save_state(self._config.output, self._network, self._optimizers, counters)

    def _load_state(self) -> None:
        state = load_state(self._config.output, self._network, self._optimizers, self._device)
        if state is not None:
            self.step = state["step"]
            self.tokens = state["tokens"]
            self.seconds = state["seconds"]
