"""Where decode steps read what is done to single tokens' scores: lists of fixed room.

The host lists what it knows; the token that only the device knows is counted there. Knows nothing
of heads, of requests, or of how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multiexit_engine.ops.edits import WORD_BITS, Edits
from multiexit_engine.ops.memory_edits import EditLists, memory_edits, note_latest
from multiexit_engine.runtime.device.packed import Packed
from multiexit_engine.score_edits import ScoreEdits

# edits that a row may have on average: the tokens of 1024 places, each seen once
EDITS_OF_A_ROW = 1024
# lists below this length share a piece; above it, up to the next power of two
LEAST_ROOM = 256
# an edit: row, token, and bias, penalty, loss, what one more token loses
_NUMBERS = 6


class EditRoom(NamedTuple):
    """What pieces are told of a step's edits.

    Attributes:
        num_edits: how many are listed at most; 0 where no row has any.
        are_masked: whether rows have tokens that may not come at all.
    """

    num_edits: int = 0
    are_masked: bool = False


NO_EDITS = EditRoom()


class CountedEdits(NamedTuple):
    """The edits of a row.

    Attributes:
        edits: by the tokens that the host knows.
        latest: see ``latest_edit``.
        mask: bits of the tokens that may come, or None.
    """

    edits: ScoreEdits
    latest: tuple[float, float, float]
    mask: bytes | None


class EditMemory:
    """The edits of the rows of a decode memory.

    Args:
        num_rows: of that memory, its spare row included.
        vocab_size: tokens that may be edited.
        device: where it lies.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.most = EDITS_OF_A_ROW * num_rows
        self._num_rows = num_rows
        self._vocab_size = vocab_size
        rows, num_words = (num_rows,), -(-vocab_size // WORD_BITS)
        self._lists = Packed(
            [
                ("edited", torch.int32, rows),
                ("starts", torch.int32, rows),
                ("counts", torch.int32, rows),
                ("masks", torch.int64, rows),
                ("penalties", torch.float32, rows),
                ("losses", torch.float32, rows),
                ("edits", torch.int32, (self.most, _NUMBERS)),
            ],
            device,
        )
        # the last one allows all tokens
        self._masks = Packed([("words", torch.int32, (num_rows + 1, num_words))], device)
        self._masks.on_device["words"].fill_(-1)
        self._latest = torch.full(rows, -1, dtype=torch.int64, device=device)
        self._rows = torch.arange(num_rows, device=device)

    def send(self, turn: int, rows: Mapping[int, CountedEdits]) -> EditRoom:
        """Copy the edits of some rows to the device; all others have none.

        Args:
            turn: which twin; the step that used it last must be over.
            rows: by their places in the memory.
        """
        if not rows:
            return NO_EDITS
        arrays = self._lists.on_host(turn)
        arrays["edited"].fill(0)
        arrays["counts"].fill(0)
        arrays["masks"].fill(self._num_rows)
        arrays["penalties"].fill(1)
        arrays["losses"].fill(0)
        masks = {row: own.mask for row, own in rows.items() if own.mask is not None}
        if masks:
            self._send_masks(turn, masks)
        stop = 0
        for row, (own, latest, mask) in rows.items():
            arrays["edited"][row] = len(own.tokens) > 0 or mask is not None
            arrays["penalties"][row], arrays["losses"][row], _ = latest
            start, stop = stop, stop + len(own.tokens)
            arrays["starts"][row], arrays["counts"][row] = start, stop - start
            edits = arrays["edits"][start:stop]
            edits[:, 0], edits[:, 1] = row, own.tokens
            edits[:, 2:].view(np.float32)[:] = own.numbers
        room = edit_room(stop)
        arrays["edits"][stop:room, 0] = self._num_rows
        self._lists.send(turn, "edits", room * _NUMBERS * 4)
        return EditRoom(room, bool(masks))

    def note_latest(self, tokens: Tensor, chosen_by: Tensor) -> None:
        """Remember the tokens that only the device knows, before others take their places.

        Args:
            tokens: [rows] int64 that the step before chose.
            chosen_by: [rows] int64: which of them is a row's last token; -1 where the host knows
                it.
        """
        note_latest(self._latest, tokens, chosen_by)

    def edits(self, rows: Tensor | slice, room: EditRoom) -> Edits:
        """What is done to rows of the memory, in their order."""
        lists = self._lists.on_device
        words = self._masks.on_device["words"] if room.are_masked else None
        listed = EditLists(
            lists["edited"],
            lists["starts"],
            lists["counts"],
            lists["masks"],
            lists["penalties"],
            lists["losses"],
            self._latest,
            lists["edits"][: room.num_edits],
            words,
        )
        own = self._rows[rows] if isinstance(rows, slice) else rows
        return memory_edits(own, listed, self._vocab_size)

    def _send_masks(self, turn: int, masks: Mapping[int, bytes]) -> None:
        """Copy masks to the device, and note for each row which is its own."""
        words = self._masks.on_host(turn)["words"]
        for place, (row, mask) in enumerate(masks.items()):
            own = words[place].view(np.uint8)
            size = min(len(mask), len(own))
            own[:size] = np.frombuffer(mask, dtype=np.uint8)[:size]
            own[size:] = 0
            self._lists.on_host(turn)["masks"][row] = place
        self._masks.send(turn, "words", len(masks) * words.shape[1] * 4)


def edit_room(count: int) -> int:
    """A power of two, ``LEAST_ROOM`` at least."""
    return max(LEAST_ROOM, 1 << (count - 1).bit_length()) if count else LEAST_ROOM
