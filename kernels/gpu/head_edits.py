"""Changes of single scores in the form in which ``heads`` reads them: bits, and numbers in order.

A tile of the vocabulary has one word of bits for each row; for tokens whose bit is set a table says
where their numbers stand. Knows nothing of heads or of how tokens are chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.launch import options

WORD_BITS = 32
_BLOCK = 1024


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
    """Either form of ``multiexit_engine.ops.edits``; what does nothing has a place of its own."""
    if hasattr(edits, "entries"):
        return PackedEdits(*edits)
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


def memory_edits(rows: Tensor, lists: Any, vocab_size: int) -> PackedEdits:
    """See ``multiexit_engine.ops.memory_edits``. One launch, a program for each row."""
    num_rows, num_words = rows.shape[0], triton.cdiv(vocab_size, WORD_BITS)
    room, device = lists.listed.shape[0], rows.device

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    # each by itself: parts of one tensor would begin at multiples of 16 bytes for some numbers of
    # rows only, and be compiled for twice; behind the listed ones a row's latest token has a place
    words, numbers = (num_rows, num_words), [room + num_rows] * 3
    made = PackedEdits(
        integers(*words), integers(num_rows, vocab_size), integers(*words), integers(num_rows),
        *(torch.empty(count, dtype=torch.float32, device=device) for count in numbers),
    )  # fmt: skip
    if num_rows:
        edits_kernel[(num_rows,)](
            rows, *lists[:7], lists.listed, lists.listed.view(torch.float32), lists.words, *made,
            room, num_words, vocab_size, BLOCK=_BLOCK, **options(4, 128),
        )  # fmt: skip
    return made


def note_latest(latest: Tensor, tokens: Tensor, chosen_by: Tensor) -> None:
    """See ``multiexit_engine.ops.memory_edits``. One launch of one program."""
    latest_kernel[(1,)](
        latest, tokens, chosen_by, latest.shape[0], BLOCK=_BLOCK, **options(4)
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def latest_kernel(latest_ptr, token_ptr, chosen_by_ptr, num_rows, BLOCK: tl.constexpr):
    """Each row's token, -1 where none of these is."""
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < num_rows
        places = tl.load(chosen_by_ptr + rows, mask=inside, other=-1)
        tokens = tl.load(token_ptr + places, mask=places >= 0, other=-1)
        tl.store(latest_ptr + rows, tokens, mask=inside)


@triton.jit(
    do_not_specialize=["room", "num_words", "vocab"],
    do_not_specialize_on_alignment=["row_ptr"],
)
def edits_kernel(
    row_ptr,
    is_listed_ptr,
    start_ptr,
    count_ptr,
    mask_ptr,
    row_penalty_ptr,
    row_loss_ptr,
    latest_ptr,
    list_ptr,
    number_ptr,
    words_ptr,
    edited_ptr,
    entry_ptr,
    allowed_ptr,
    is_edited_ptr,
    add_ptr,
    penalty_ptr,
    loss_ptr,
    room,
    num_words,
    vocab,
    BLOCK: tl.constexpr,
):
    """All that is done to one row: its bits, its listed edits, and that of its latest token."""
    place = tl.program_id(0)
    row = tl.load(row_ptr + place)
    edited_ptr += place.to(tl.int64) * num_words
    allowed_ptr += place.to(tl.int64) * num_words
    entry_ptr += place.to(tl.int64) * vocab
    if words_ptr is not None:
        words_ptr += tl.load(mask_ptr + row) * num_words
    for start in range(0, num_words, BLOCK):
        words = start + tl.arange(0, BLOCK)
        inside = words < num_words
        allowed = tl.full((BLOCK,), -1, tl.int32)
        if words_ptr is not None:
            allowed = tl.load(words_ptr + words, mask=inside, other=0)
        tl.store(allowed_ptr + words, allowed, mask=inside)
        tl.store(edited_ptr + words, tl.zeros((BLOCK,), tl.int32), mask=inside)
    # bits are set by other threads than those that cleared them
    tl.debug_barrier()
    latest = tl.load(latest_ptr + row).to(tl.int32)
    row_penalty = tl.load(row_penalty_ptr + row)
    row_loss = tl.load(row_loss_ptr + row)
    first, count = tl.load(start_ptr + row), tl.load(count_ptr + row)
    is_known = 0
    for start in range(0, count, BLOCK):
        inside = start + tl.arange(0, BLOCK) < count
        edits = (first + start + tl.arange(0, BLOCK)).to(tl.int64)
        tokens = tl.load(list_ptr + edits * 6 + 1, mask=inside, other=0)
        is_late = inside & (tokens == latest)
        is_known = tl.maximum(is_known, tl.max(is_late.to(tl.int32), 0))
        bias = tl.load(number_ptr + edits * 6 + 2, mask=inside, other=0.0)
        penalty = tl.load(number_ptr + edits * 6 + 3, mask=inside, other=1.0)
        loss = tl.load(number_ptr + edits * 6 + 4, mask=inside, other=0.0)
        more = tl.load(number_ptr + edits * 6 + 5, mask=inside, other=0.0)
        tl.store(add_ptr + edits, bias, mask=inside)
        tl.store(penalty_ptr + edits, tl.where(is_late, row_penalty, penalty), mask=inside)
        tl.store(loss_ptr + edits, tl.where(is_late, loss + more, loss), mask=inside)
        tl.store(entry_ptr + tokens, edits.to(tl.int32), mask=inside)
        tl.atomic_or(edited_ptr + tokens // 32, 1 << (tokens % 32), mask=inside)
    changes = (row_penalty != 1.0) | (row_loss != 0.0)
    is_new = (latest >= 0) & (is_known == 0) & changes
    own = room + place
    tl.store(add_ptr + own, 0.0)
    tl.store(penalty_ptr + own, row_penalty)
    tl.store(loss_ptr + own, row_loss)
    tl.store(entry_ptr + latest, own, mask=is_new)
    tl.atomic_or(edited_ptr + latest // 32, 1 << (latest % 32), mask=is_new)
    tl.store(is_edited_ptr + place, tl.load(is_listed_ptr + row) | is_new.to(tl.int32))
