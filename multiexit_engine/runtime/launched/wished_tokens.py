"""What rows of the decode memory want of their heads besides a token, and the ops that give it.

Reads the memories of rows and of what is done to their scores. Knows nothing of layers, or of
which head a row has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.decoding.draws import Draws, group_tokens
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.ops.best_tokens import BestTokens, no_best_tokens
from multiexit_engine.ops.narrowing import Narrowing
from multiexit_engine.ops.tokens import RowGroup
from multiexit_engine.runtime.launched.decode_memory import BEST, NARROWING, DecodeMemory
from multiexit_engine.runtime.launched.edit_memory import NO_EDITS, EditMemory, EditRoom


class HeadWishes(NamedTuple):
    """What rows of a step want of their heads besides a token: hashable, as a part of pieces' keys.

    Attributes:
        are_narrowed: some draw from a part of their tokens.
        have_least: some contrasts keep more than one plausible token at least.
        are_told: some list best tokens.
        edits: what is done to scores before.
    """

    are_narrowed: bool = False
    have_least: bool = False
    are_told: bool = False
    edits: EditRoom = NO_EDITS


class WishedTokens:
    """Chooses tokens of rows of the decode memory.

    Args:
        memory: the rows' inputs and results.
        edits: what is done to their scores.
    """

    def __init__(self, memory: DecodeMemory, edits: EditMemory) -> None:
        self._memory = memory
        self._edits = edits

    def note_latest(self) -> None:
        """Remember tokens that edits have to count, before a step's own take their places."""
        results, inputs = self._memory.results, self._memory.inputs
        self._edits.note_latest(results["tokens"], inputs["chosen_by"])

    def choose(
        self,
        own: Tensor | slice,
        upper: HeadOperands,
        groups: Sequence[RowGroup],
        wishes: HeadWishes,
    ) -> dict[str, Tensor]:
        """Choose the tokens of rows whose heads have one matrix, which is read once.

        Args:
            own: [rows] int64 or a slice: the rows of the memory.
            upper: their head, each with a state of its own.
            groups: the rows in order, by what they are contrasted with.
            wishes: of these rows.

        Returns:
            [rows, ...] each, by the names that these results have in the memory.
        """
        inputs = self._memory.inputs
        draws = self._draws(own, wishes.are_narrowed)
        counts = torch.zeros_like(draws.seeds, dtype=torch.int32)
        best = self._best_tokens(own) if wishes.are_told else None
        edits = None
        if wishes.edits.num_edits:
            edits = self._edits.edits(own, wishes.edits)
        least = inputs["min_candidates"][own] if wishes.have_least else None
        alpha = inputs["alphas"][own]
        tokens, logprobs = group_tokens(upper, groups, alpha, least, draws, counts, edits, best)
        found = {"tokens": tokens, "logprobs": logprobs.float(), "candidates": counts}
        return found | dict(zip(BEST, best[1:] if best else (), strict=False))

    def _draws(self, own: Tensor | slice, are_narrowed: bool) -> Draws:
        inputs = self._memory.inputs
        narrowing = Narrowing(*(inputs[name][own] for name in NARROWING)) if are_narrowed else None
        return Draws(
            inputs["temperatures"][own], inputs["seeds"][own], inputs["counts"][own], narrowing
        )

    def _best_tokens(self, own: Tensor | slice) -> BestTokens:
        asked = self._memory.inputs["logprobs"][own]
        return no_best_tokens(asked, self._memory.results[BEST[0]].shape[1])
