"""Hidden states that wait at an exit for the layers above it, beside the KV cache.

One state for each slot of the KV cache, so that blocks own, share, copy and free both alike. Knows
nothing of which rows wait, or for what.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.transfer import to_device


class ExitStates:
    """The raw residual stream of a token after some layer, found by its KV slot.

    Takes no memory until the first state is kept, whose dtype all others must have.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        hidden_size: int,
        device: torch.device,
    ) -> None:
        self._shape = num_blocks * block_size, hidden_size
        self._block_size = block_size
        self._device = device
        self._states: Tensor | None = None

    def keep(self, slots: Tensor, hidden: Tensor) -> None:
        """Store states [rows, hidden] in the slots [rows] int64, all different."""
        if self._states is None:
            self._states = hidden.new_empty(self._shape)
        self._states.index_copy_(0, slots, hidden)

    def take(self, slots: Tensor) -> Tensor:
        """[rows, hidden]: the states that were stored last in the slots [rows] int64."""
        assert self._states is not None, "no state was ever kept"
        return self._states.index_select(0, slots)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, from the first to the second of each pair."""
        if not pairs or self._states is None:
            return
        blocks = self._states.view(-1, self._block_size, self._shape[1])
        source, target = to_device(pairs, self._device).unbind(1)
        blocks[target] = blocks[source]
