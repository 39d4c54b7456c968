"""How sequences draw: what of it stays the same from step to step, as tensors that are kept.

Knows requests; nothing of scores or of how a token is chosen.
"""

from __future__ import annotations

import torch

from multiexit_engine.decoding.draws import Draws
from multiexit_engine.decoding.warpers import narrowing_of
from multiexit_engine.request import Sequence, sequence_seed
from multiexit_engine.transfer import to_device

# groups of sequences whose tensors are kept: most steps are of those of the step before
KEPT_GROUPS = 8


class KeptDraws:
    """The draws of groups of sequences, all of which came to their final place in a request."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, ...], tuple[list[Sequence], Draws]] = {}

    def of(self, sequences: list[Sequence]) -> Draws:
        """How each of some sequences draws; its ``positions`` are those of first tokens."""
        # The sequences are kept beside their draws, so that their ids stay theirs.
        key = tuple(map(id, sequences))
        if key not in self._kept:
            if len(self._kept) == KEPT_GROUPS:
                self._kept.clear()
            self._kept[key] = sequences, self._new(sequences)
        return self._kept[key][1]

    def _new(self, sequences: list[Sequence]) -> Draws:
        sampling = [sequence.request.sampling for sequence in sequences]
        heats = [params.temperature for params in sampling]
        seeds = [sequence_seed(s.request.seed, s.index) for s in sequences]
        first = to_device([0] * len(sequences), self._device, torch.int64)
        return Draws(
            to_device(heats, self._device, torch.float32),
            to_device(seeds, self._device, torch.int64),
            first,
            narrowing_of(sampling, self._device),
        )
