"""The training loop: step, clock, rates, saved states.

It knows one network and one stream of tokens on one device. It does not know what the network is
made of, where the tokens come from or what is done with the result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from multiexit_engine.train.causal_config import CausalTrainingConfig, TrainingProgress
from multiexit_engine.train.corpus import BlockSampler
from multiexit_engine.train.exits import MultiExitNetwork, exit_loss_weights
from multiexit_engine.train.optimizers import RateSchedule, layer_optimizers
from multiexit_engine.train.saved_state import load_state, save_state

logger = logging.getLogger(__name__)

LOG_EVERY_STEPS = 20


class TrainingLoop:
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
        self._samplers = {
            size: BlockSampler(stream, size, config.batch_tokens // size, config.seed)
            for size in (config.first_block_size, config.block_size)
        }
        self._weights = exit_loss_weights(
            network.layers, config.num_layers, config.early_exit_weight
        ).to(self._device)
        self._optimizers = layer_optimizers(
            network,
            config.matrix_learning_rate,
            config.other_learning_rate,
            config.weight_decay,
        )
        self._schedule = RateSchedule(self._optimizers, config.warmup_steps, config.decay_share)
        self._losses: Callable[[Tensor, bool], Tensor] = network
        if config.compile:
            self._losses = torch.compile(network, dynamic=False)

    def run(self, on_progress: Callable[[TrainingProgress], None] | None) -> None:
        """Steps until max_steps or max_minutes are used up."""
        if self._config.resume:
            self._load_state()
        self._network.train()
        if self._config.compile and self._share_done() < 1.0:
            self._compile()
        mark_step, mark_time = self.step, time.monotonic()
        before, start = self.seconds, mark_time
        while (share := self._share_done()) < 1.0:
            losses = self._train_step(share)
            self.step += 1
            now = time.monotonic()
            self.seconds = before + now - start
            if self.step % LOG_EVERY_STEPS == 0 or self.step == self._config.max_steps:
                values = losses.tolist()
                now = time.monotonic()
                steps = self.step - mark_step
                self.tokens_per_second = steps * self._config.batch_tokens / (now - mark_time)
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
        self._accumulate(self._micro_batches(share=0.0)[0], scale=1.0)
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
        micro_batches = self._micro_batches(share)
        total = torch.zeros_like(self._weights)
        for ids in micro_batches:
            total += self._accumulate(ids, scale=1.0 / len(micro_batches))
        nn.utils.clip_grad_norm_(self._network.parameters(), self._config.gradient_clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    def _micro_batches(self, share: float) -> tuple[Tensor, ...]:
        is_first = share < self._config.first_block_share
        size = self._config.first_block_size if is_first else self._config.block_size
        rows = self._config.micro_batch_tokens // size
        return torch.split(self._samplers[size].batch(self.step), rows)

    def _accumulate(self, ids: Tensor, scale: float) -> Tensor:
        """Adds the gradients of one micro-batch; returns its losses [exits] times `scale`."""
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"
        ):
            losses = self._losses(ids, self._config.share_rows) * scale
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
        counters = {"step": self.step, "seconds": self.seconds}
        save_state(self._config.output, self._network, self._optimizers, counters)

    def _load_state(self) -> None:
        state = load_state(self._config.output, self._network, self._optimizers, self._device)
        if state is not None:
            self.step = state["step"]
            self.seconds = state["seconds"]
