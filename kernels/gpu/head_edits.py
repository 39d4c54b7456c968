"""Changes of single scores in the form in which ``heads`` reads them: bits, and numbers in order.

A tile of the vocabulary has one word of bits for each row; for tokens whose bit is set a table says
where their numbers stand. Knows nothing of heads or of how tokens are chosen.
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
        entries: [rows, vocab] int32: where a token's numbers stand, if it has any; else nonsense.
        allowed: [rows, words] int32: bits of the tokens that may come.
        is_edited: [rows] int32: 0 for rows that nothing changes.
        bias: [edits] float32.
        penalty: [edits] float32.
        loss: [edits] float32.
    """

    edited: Tensor
    entries: Tensor
    allowed: Tensor
    is_edited: Tensor
    bias: Tensor
    penalty: Tensor
    loss: Tensor

    def rows(self, part: slice) -> PackedEdits:
        """Those of some rows; the numbers of all stay where they are."""
        return self._replace(
            edited=self.edited[part],
            entries=self.entries[part],
            allowed=self.allowed[part],
            is_edited=self.is_edited[part],
        )


def pack_edits(edits: Any, vocab: int) -> PackedEdits:
    """Of ``multiexit_engine.ops.edits.TokenEdits``; what does nothing has a place of its own."""
    num_rows, num_words = edits.edited.shape[0], -(-vocab // WORD_BITS)
    device = edits.edited.device
    is_nothing = edits.rows >= num_rows
    words = edits.rows * num_words + edits.tokens // WORD_BITS
    words = torch.where(is_nothing, num_rows * num_words, words)
    bits = (1 << edits.tokens % WORD_BITS).to(torch.int32)
    edited = torch.zeros(num_rows * num_words + 1, dtype=torch.int32, device=device)
    edited.index_add_(0, words, bits)
    places = torch.where(is_nothing, num_rows * vocab, edits.rows * vocab + edits.tokens)
    entries = torch.empty(num_rows * vocab + 1, dtype=torch.int32, device=device)
    numbers = torch.arange(places.shape[0], dtype=torch.int32, device=device)
    entries.index_copy_(0, places, numbers)
    allowed = edits.allowed
    if allowed is None:
        allowed = torch.full((num_rows, num_words), -1, dtype=torch.int32, device=device)
    return PackedEdits(
        edited[:-1].view(num_rows, num_words),
        entries[:-1].view(num_rows, vocab),
        allowed,
        edits.edited,
        edits.bias,
        edits.penalty,
        edits.loss,
    )
