"""The tokens of rows that chose their exit on the device, from the heads of these exits.

What a row's head reads is kept when it leaves, so rows of exits with one matrix are chosen
together. Knows nothing of who leaves, of layers that run, or of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.layers.exit_heads import Head, HeadOperands
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.ops import compact_rows, head_logits, listed_head_statistics
from multiexit_engine.ops.exit_rows import ExitProgress
from multiexit_engine.ops.tokens import RowGroup
from multiexit_engine.runtime.launched.decode_memory import DecodeMemory
from multiexit_engine.runtime.launched.decode_pieces import DecodePieces
from multiexit_engine.runtime.launched.exit_memory import CHOOSES, WISHES, ExitMemory
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes, WishedTokens


class ExitTokens:
    """Chooses tokens of one model.

    Args:
        model: the decoder.
        memory: of the rows, which takes their results.
        exits: what the rows do, and where they left.
        rows: in whose memory states lie.
        wished: chooses for rows that want more than the best token.
    """

    def __init__(
        self,
        model: MultiExitModel,
        memory: DecodeMemory,
        exits: ExitMemory,
        rows: DecodePieces,
        wished: WishedTokens,
    ) -> None:
        self._heads = model.heads
        self._memory = memory
        self._exits = exits
        self._rows = rows
        self._wished = wished
        # what the head of the exit that a row left at reads of it
        self._read: Tensor | None = None

    def keep(self, rows: Tensor | slice, which: Tensor, hidden: Tensor) -> None:
        """Keep what heads read of those rows that just left.

        Args:
            rows: of the memory.
            which: [rows] bool.
            hidden: [rows, hidden] of the exit's operands.
        """
        if self._read is None:
            self._read = hidden.new_zeros(self._memory.spare_row + 1, hidden.shape[1])
        self._read[rows] = torch.where(which[:, None], hidden, self._read[rows])

    def choose(
        self, rows: slice, exits: Sequence[int], are_kept: bool, wishes: HeadWishes | None
    ) -> None:
        """Choose the tokens that no measure told.

        Args:
            rows: of the memory, which have gone as far as they go.
            exits: layers at which some may have left.
            are_kept: whether it was kept what heads read; else nobody who left needs a head.
            wishes: of those rows that want more than the best token; None where none does.
        """
        progress, flags = self._exits.progress(rows), self._exits.inputs["flags"][rows]
        chooses, is_wishing = flags & CHOOSES != 0, flags & WISHES != 0
        chosen = {"tokens": progress.tokens, "logprobs": torch.zeros_like(progress.values)}
        for head, is_here in self._by_matrix(rows, exits, are_kept, progress):
            best = compact_rows(chooses & is_here & ~is_wishing & (progress.is_read == 0))
            found = listed_head_statistics(*head, best)
            read = {"tokens": found.tokens, "logprobs": found.log_probs.float()}
            _take(chosen, best.marks(), read)
            if wishes is not None:
                groups = [RowGroup(len(head.hidden))]
                told = self._wished.choose(rows, head, groups, wishes)
                _take(chosen, is_here & is_wishing, told)
        results = {name: self._memory.results[name][rows] for name in chosen}
        _take(results, chooses, chosen)
        for name, numbers in results.items():
            self._memory.results[name][rows] = numbers

    def scores(self, rows: Tensor, exits: Sequence[int]) -> Tensor:
        """[rows, vocab] float32: raw scores of rows, what heads read of them having been kept.

        Args:
            rows: [rows] int64, of the memory, which have gone as far as they go.
            exits: layers at which some may have left.
        """
        parts = self._by_matrix(rows, exits, True, self._exits.progress(rows))
        scores = head_logits(*parts[0][0])
        for head, is_here in parts[1:]:
            scores = torch.where(is_here[:, None], head_logits(*head), scores)
        return scores

    def _by_matrix(
        self, rows: Tensor | slice, exits: Sequence[int], are_kept: bool, progress: ExitProgress
    ) -> list[tuple[HeadOperands, Tensor]]:
        """Each matrix with what it reads of all rows, and [rows] bool: whose head it is."""
        original = self._heads.original
        last = self._heads.operands(original, self._rows.states(original.layer)[rows])
        if not are_kept:
            return [(last, progress.left == 0)]
        self.keep(rows, progress.left == 0, last.hidden)
        assert self._read is not None, "it was just kept"
        by_matrix: dict[tuple[int, int], tuple[HeadOperands, Tensor]] = {}
        for layer, head in [(0, original), *((layer, Head(layer)) for layer in exits)]:
            own = self._heads.operands(head, self._rows.states(head.layer)[rows][:1])
            key, is_here = (id(own.weight), id(own.bias)), progress.left == layer
            if key in by_matrix:
                is_here = is_here | by_matrix[key][1]
            by_matrix[key] = own._replace(hidden=self._read[rows]), is_here
        return [*by_matrix.values()]


def _take(target: dict[str, Tensor], which: Tensor, source: dict[str, Tensor]) -> None:
    """Put some rows of [rows, ...] tensors in the place of others of the same names."""
    for name, own in source.items():
        marks = which.view(-1, *(1,) * (own.dim() - 1))
        target[name] = torch.where(marks, own, target.get(name, own))
