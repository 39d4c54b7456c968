"""Changes of single scores in the form in which ``heads`` reads them: bits, and numbers in order.

A tile of the vocabulary has one word of bits for each row; from it, the place of a token's numbers
follows without a search. Knows nothing of heads or of how tokens are chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32


class PackedEdits(NamedTuple):
    """In the order in which the last kernel takes them.

    Attributes:
        edited: [rows, words] int32: bit t % 32 of word t // 32 is set where token t has numbers.
        starts: [rows, words] int32: where the numbers of a word's first token stand.
        allowed: [rows, words] int32: bits of the tokens that may come.
        is_edited: [rows] int32: 0 for rows that nothing changes.
        bias: [edits] float32.
        penalty: [edits] float32.
        loss: [edits] float32.
    """

    edited: Tensor
    starts: Tensor
    allowed: Tensor
    is_edited: Tensor
    bias: Tensor
    penalty: Tensor
    loss: Tensor

    def rows(self, part: slice) -> PackedEdits:
        """Those of some rows; the numbers of all stay where they are."""
        return self._replace(
            edited=self.edited[part],
            starts=self.starts[part],
            allowed=self.allowed[part],
            is_edited=self.is_edited[part],
        )


def pack_edits(edits: Any, vocab: int) -> PackedEdits:
    """Of ``multiexit_engine.ops.edits.TokenEdits``; every sum is one of integers."""
    num_rows, num_words = edits.edited.shape[0], -(-vocab // WORD_BITS)
    device = edits.edited.device
    places = edits.rows * num_words + edits.tokens // WORD_BITS
    bits = (1 << edits.tokens % WORD_BITS).to(torch.int32)
    empty = torch.zeros(num_rows * num_words, dtype=torch.int32, device=device)
    edited = empty.index_add(0, places, bits)
    counts = empty.index_add(0, places, torch.ones_like(bits))
    starts = counts.cumsum(0, dtype=torch.int32) - counts
    allowed = edits.allowed
    if allowed is None:
        allowed = torch.full((num_rows, num_words), -1, dtype=torch.int32, device=device)
    shape = num_rows, num_words
    numbers = edits.bias, edits.penalty, edits.loss
    return PackedEdits(edited.view(shape), starts.view(shape), allowed, edits.edited, *numbers)
