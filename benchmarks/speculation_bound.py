"""What self-speculation gains where everything runs at the machine's best speed.

Each product takes as long as its weights take from memory, or its arithmetic, whichever is longer;
nothing else takes any time. Both speeds are measured on the machine of the run. Where plain
decoding is farther from its own best than drafts and checks are from theirs, more can be gained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from multiexit_engine import _C, Engine
from multiexit_engine.ops import linear, use_backend
from multiexit_engine.runtime.drafts.drafting import LEAST_DRAFT_VOCAB

LONGEST = 16
READ_NUMBERS = 64 << 20
# rows and columns of a matrix that stays in the caches, and rows enough to be busy with it
CACHED, BUSY_ROWS = (2304, 768), 32


@dataclass(frozen=True)
class Peaks:
    """What the machine does at best: bytes read and operations a second."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> Peaks:
        """Of this machine, with as many threads as PyTorch has."""
        numbers = torch.ones(READ_NUMBERS)
        threads = torch.get_num_threads()
        reading = _best(lambda: _C.plain_read(threads, numbers.data_ptr(), numbers.numel()))
        weight, x = torch.ones(CACHED).to(dtype), torch.ones(BUSY_ROWS, CACHED[1]).to(dtype)
        with torch.inference_mode(), use_backend("native"):
            computing = _best(lambda: linear(x, weight, None))
        return cls(numbers.nbytes / reading, 2 * BUSY_ROWS * weight.numel() / computing)


def _best(run: Callable[[], object], rounds: int = 20) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@dataclass(frozen=True)
class SpeculationBound:
    """Of one model, one exit and one machine.

    Attributes:
        layer: weights of a layer.
        head: weights of a head.
        draft_head: those that a draft reads.
        num_layers: that the target runs.
        draft_exit: that drafts.
        weight_bytes: of one weight.
        peaks: of the machine.
    """

    layer: int
    head: int
    draft_head: int
    num_layers: int
    draft_exit: int
    weight_bytes: int
    peaks: Peaks

    @classmethod
    def of(cls, engine: Engine, draft_exit: int, dtype: torch.dtype) -> SpeculationBound:
        """Of an engine whose target runs all layers."""
        config = engine.model_config
        drafted = min(config.vocab_size, max(LEAST_DRAFT_VOCAB, config.vocab_size // 4))
        return cls(
            sum(weight.numel() for weight in engine._model.blocks[0].parameters()),
            config.vocab_size * config.hidden_size,
            drafted * config.hidden_size,
            config.num_layers,
            draft_exit,
            dtype.itemsize,
            Peaks.measure(dtype),
        )

    def gain(self, rate: float, batch: int, length: int | None) -> float:
        """Tokens a second over plain decoding's; of the best length where none is given."""
        if length is None:
            return max(1.0, *(self.gain(rate, batch, k) for k in range(1, LONGEST + 1)))
        tokens = sum(rate**k for k in range(length + 1))
        above = (self.num_layers - self.draft_exit) * self.layer + self.head
        below = self.draft_exit * self.layer
        plain = self._seconds(below + above, batch)
        drafts = length * self._seconds(below + self.draft_head, batch)
        check = self._seconds(below, batch) + self._seconds(above, batch * (1 + length))
        return tokens * plain / (drafts + check)

    def _seconds(self, weights: int, rows: int) -> float:
        return max(
            weights * self.weight_bytes / self.peaks.bytes_per_s,
            2 * weights * rows / self.peaks.flops_per_s,
        )


def rate_of(share: float, length: int) -> float:
    """The chance of each draft, of which ``length`` in a row are accepted to this share."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**k for k in range(1, length + 1)) < share * length:
            low = middle
        else:
            high = middle
    return low
