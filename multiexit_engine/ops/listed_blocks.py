"""A span of decoder blocks for those rows that go on, as the device alone knows, as one op.

``decoder_blocks`` for those who must not wait to be told who goes on. Every row is a sequence of
its own with the keys before it. Knows nothing of who leaves, or why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multiexit_engine.batch import ForwardBatch, SequenceLayout
from multiexit_engine.ops.blocks import KVCache
from multiexit_engine.ops.operands import is_plain, is_streamed
from multiexit_engine.ops.registry import register_op
from multiexit_engine.ops.row_lists import RowList


@dataclass(frozen=True, eq=False)
class ListedRows:
    """Which rows of a step a span of blocks computes, as the device alone knows.

    Attributes:
        running: rows that run.
        copied: rows that only give keys and values, in every layer from the state that they have;
            none of them runs. None where there cannot be any.
        tables: [rows] int64, the block table of each row, and that of its source.
        spare_slot: of the cache, that nobody owns.
    """

    running: RowList
    copied: RowList | None
    tables: Tensor
    spare_slot: int


@register_op
def listed_decoder_blocks(
    hidden: Tensor,
    blocks: Sequence[Any],
    kv_cache: KVCache,
    batch: ForwardBatch,
    listed: ListedRows,
) -> Tensor:
    """``decoder_blocks`` where the host does not know which rows go on. It does not wait.

    What is launched for nobody reads no weight in backends. Backends for half precision may keep
    what lies between input and result in float32. Running two spans one after the other gives the
    same bits as running both in one call, and a row's result does not depend on the others.

    Args:
        hidden: [rows, hidden] in the dtype of the weights, or what an earlier span gave.
        blocks: at least one ``layers.block.DecoderBlock``, whose parts a backend reads.
        kv_cache: the keys and values of these layers are written for rows that run or are copied;
            for others perhaps in the spare slot, nowhere else.
        batch: the rows; of each one token, which sees the keys up to its own. The block tables of
            its layout are those that ``listed`` points to, as are those of its sources.
        listed: which of the rows.

    Returns:
        A new tensor of the shape of ``hidden``, in its dtype or in float32. Rows that do not run
        are as they were.

    Source: as ``decoder_blocks``; that nobody waits, as ``ragged_blocks``.
    """
    own = replace(
        batch,
        layout=_owned(batch.layout, listed.tables),
        slot_mapping=_slots(batch.slot_mapping, listed.running, listed.spare_slot),
        sources=None if batch.sources is None else _owned(batch.sources, listed.tables),
    )
    copied = listed.copied
    states, runs = hidden, listed.running.marks()[:, None]
    for block in blocks:
        if copied is not None:
            slots = _slots(batch.slot_mapping, copied, listed.spare_slot)
            block.write_kv(hidden, kv_cache, batch.positions, slots)
        states = torch.where(runs, block(states, kv_cache, own), states)
    return states


def _owned(layout: SequenceLayout, tables: Tensor) -> SequenceLayout:
    """The layout with the block table that each row has."""
    return replace(layout, block_tables=layout.block_tables.index_select(0, tables), scratch={})


def _slots(slots: Tensor, listed: RowList, spare_slot: int) -> Tensor:
    """Those of listed rows, and the spare one for others."""
    return torch.where(listed.marks(), slots, spare_slot)


def _are_matrices_streamed(
    hidden: Tensor, blocks: Sequence[Any], kv_cache: KVCache, *_: object
) -> bool:
    """Whether the GPU's kernels read the matrices."""
    return is_streamed(blocks[0].attention.qkv.weight) and is_plain(hidden)


listed_decoder_blocks.backend(
    "triton",
    "multiexit_engine.kernels.listed_blocks:listed_decoder_blocks",
    device="cuda",
    supports=_are_matrices_streamed,
)
