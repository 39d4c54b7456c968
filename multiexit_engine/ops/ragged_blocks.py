"""A span of blocks over packed texts whose rows leave as the device decides, as one op.

``packed_blocks`` for those who must not wait to be told which rows go on. Nothing is cached; knows
nothing of who leaves, or why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from multiexit_engine.ops.operands import is_plain, is_streamed
from multiexit_engine.ops.packed_blocks import PackedSources, PackedTexts, packed_blocks
from multiexit_engine.ops.registry import device_kind, is_reference_forced, register_op
from multiexit_engine.ops.row_lists import RowList, compact_rows


@dataclass(frozen=True, eq=False)
class RaggedTexts:
    """Texts one behind the other, and which of their rows go on, as the device alone knows.

    Attributes:
        starts: [texts + 1] int32, where each text begins, and all end. Rows behind them are
            nobody's, and do not go on.
        rows: those that go on.
        query_starts: [texts + 1] int32, how many of them lie before each text.
        keyed: all rows of the texts some of whose rows go on.
    """

    starts: Tensor
    rows: RowList
    query_starts: Tensor
    keyed: RowList

    @classmethod
    def of(cls, goes_on: Tensor, starts: Tensor, owners: Tensor) -> RaggedTexts:
        """From [rows] bool that say who goes on, and [rows] int64, the text of each row.

        A row that is nobody's belongs to a text without rows.
        """
        rows = compact_rows(goes_on)
        query_starts = rows.before[starts.long()]
        is_alive = query_starts[1:] > query_starts[:-1]
        return cls(starts, rows, query_starts, compact_rows(is_alive[owners]))


@dataclass(frozen=True, eq=False)
class RaggedSources:
    """What the rows of texts read of the sources that they belong to.

    Attributes:
        keys_values: [rows of sources, blocks, 2, heads, head_dim], keys before values; anything in
            sources that nobody reads.
        starts: [sources + 1] int32, where each source begins, and all end.
        query_starts: [sources + 1] int32, how many rows that go on read a source before each.
    """

    keys_values: Tensor
    starts: Tensor
    query_starts: Tensor


@register_op
def ragged_blocks(
    hidden: Tensor,
    blocks: Sequence[Callable[..., Tensor]],
    texts: RaggedTexts,
    sources: RaggedSources | None = None,
    is_attended: bool = False,
) -> Tensor:
    """``packed_blocks`` where the host does not know which rows go on.

    A backend launches every block whoever is left, and what is launched for nobody reads no weight.
    Backends for half precision may keep what lies between input and result in float32. Running two
    spans one after the other gives the same bits as running both in one call, and a text's result
    does not depend on the others.

    Args:
        hidden: [rows, hidden] in the dtype of the weights, or what an earlier span gave.
        blocks: at least one ``layers.block.Block``, whose parts a backend reads.
        texts: how the rows lie, and which of them go on.
        sources: what blocks with cross-attention read.
        is_attended: whether ``hidden`` is what the first block's self-attention gave, its norm
            included.

    Returns:
        A new tensor of the shape of ``hidden``, in its dtype or in float32. Rows that stay are as
        they were.

    Source: Li et al. 2022, arXiv:2210.13304; that no row is computed in vain, as in the grouped
        products of MegaBlocks, Gale et al. 2022, arXiv:2211.15841.
    """
    index = texts.rows.index()
    if not len(index):
        return hidden.clone()
    packed = PackedTexts(_lens(texts.starts), _lens(texts.query_starts), index)
    read = None
    if sources is not None:
        lens = _lens(sources.starts), _lens(sources.query_starts)
        read = PackedSources(sources.keys_values, *lens)
    return packed_blocks.reference(hidden, blocks, packed, read, is_attended)


def _lens(starts: Tensor) -> list[int]:
    """From the host's point of view, which waits for it."""
    return starts.diff().tolist()


def _are_matrices_streamed(hidden: Tensor, blocks: Sequence[Any], *_: object) -> bool:
    """Whether the GPU's kernels read the matrices, and no attention has a bias for distances."""
    attention = blocks[0].attention
    return is_streamed(attention.qkv.weight) and attention.bias is None and is_plain(hidden)


def are_rows_ragged(hidden: Tensor, blocks: Sequence[Any]) -> bool:
    """Whether ``ragged_blocks`` of such rows runs on a device, without waiting for it."""
    kinds = {backend.device for backend in ragged_blocks.backends.values()}
    is_on_device = device_kind(hidden.device) in kinds and not is_reference_forced()
    return is_on_device and _are_matrices_streamed(hidden, blocks)


ragged_blocks.backend(
    "triton",
    "multiexit_engine.kernels.ragged_blocks:ragged_blocks",
    device="cuda",
    supports=_are_matrices_streamed,
)
