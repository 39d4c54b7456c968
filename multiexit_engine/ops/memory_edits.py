"""What is done to scores of rows of a memory, laid out where it is read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.ops.edits import Edits, LatestTokens, TokenEdits, with_latest
from multiexit_engine.ops.registry import register_op


class EditLists(NamedTuple):
    """Edits of the rows of a memory, as a host lists them: a row's stand one after the other.

    Attributes:
        edited: [memory] int32: 1 for rows with an edit or a mask.
        starts: [memory] int32: where a row's edits begin.
        counts: [memory] int32: how many they are.
        masks: [memory] int64: which of ``words`` is the row's.
        penalties: [memory] float32: ``LatestTokens.penalty``.
        losses: [memory] float32: ``LatestTokens.loss``.
        latest: [memory] int64: ``LatestTokens.tokens``.
        listed: [room, 6] int32: row of the memory, or their number for an edit that does nothing;
            token; then the bits of four float32: bias, penalty and loss as in ``TokenEdits``, and
            ``LatestTokens.more``.
        words: [masks, ceil(vocab / 32)] int32, see ``TokenEdits.allowed``; None: no row has a mask.
    """

    edited: Tensor
    starts: Tensor
    counts: Tensor
    masks: Tensor
    penalties: Tensor
    losses: Tensor
    latest: Tensor
    listed: Tensor
    words: Tensor | None


@register_op
def memory_edits(rows: Tensor, lists: EditLists, vocab_size: int) -> Edits:
    """What is done to the scores of some rows of a memory; the host does not wait.

    Args:
        rows: [rows] int64 of the memory, each once; the order is that of the result.
        lists: of the whole memory.
        vocab_size: tokens that may be edited.

    Returns:
        The edits of these rows, those of their latest tokens included, in either form.

    Source: as ``edited_scores``.
    """
    num_memory, device = len(lists.edited), rows.device
    places = torch.full((num_memory + 1,), len(rows), device=device)
    places[rows] = torch.arange(len(rows), device=device)
    numbers = lists.listed.view(torch.float32)
    edits = TokenEdits(
        places[lists.listed[:, 0].long()],
        lists.listed[:, 1].long(),
        numbers[:, 2].contiguous(),
        numbers[:, 3].contiguous(),
        numbers[:, 4].contiguous(),
        None if lists.words is None else lists.words[lists.masks[rows]],
        lists.edited[rows],
    )
    latest = lists.latest[rows], lists.penalties[rows], lists.losses[rows]
    return with_latest(edits, LatestTokens(*latest, numbers[:, 5].contiguous()))


@register_op
def note_latest(latest: Tensor, tokens: Tensor, chosen_by: Tensor) -> None:
    """Remember tokens that only the device knows, before others take their places.

    Args:
        latest: [rows] int64 that is overwritten: each row's last token, -1 where the host knows it.
        tokens: [tokens] int64 that an earlier step chose.
        chosen_by: [rows] int64: which of them is the row's; below 0 where the host knows it.

    Returns:
        None.

    Source: as ``with_latest``, which counts them.
    """
    latest.copy_(torch.where(chosen_by < 0, -1, tokens[chosen_by.clamp(min=0)]))


memory_edits.backend(
    "triton",
    "multiexit_engine.kernels.head_edits:memory_edits",
    device="cuda",
)
note_latest.backend(
    "triton",
    "multiexit_engine.kernels.head_edits:note_latest",
    device="cuda",
)
