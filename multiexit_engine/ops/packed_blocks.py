"""A span of blocks over texts that lie packed and see themselves whole, as one op.

Encoders, and decoders that find all tokens at once. Some rows of a text may stay as they are while
the others go on. Nothing is cached; knows nothing of who leaves, or why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor

from multiexit_engine.ops.operands import is_plain, is_streamed
from multiexit_engine.ops.registry import register_op


@dataclass(frozen=True, eq=False)
class PackedTexts:
    """Texts one behind the other, and which of their rows go on.

    Attributes:
        lens: rows of each text.
        query_lens: how many of them go on; a text of which none does is neither read nor changed.
        rows: [sum(query_lens)] int64, those that go on, ascending; None for all.
    """

    lens: Sequence[int]
    query_lens: Sequence[int]
    rows: Tensor | None = None

    @classmethod
    def whole(cls, lens: Sequence[int]) -> PackedTexts:
        """Texts of which all rows go on."""
        return cls(lens, lens)

    @cached_property
    def alive(self) -> list[int]:
        """The texts some of whose rows go on."""
        return [text for text, count in enumerate(self.query_lens) if count]

    @cached_property
    def keyed(self) -> list[int]:
        """All rows of the texts some of whose rows go on: those that give keys and values."""
        starts = list(accumulate(self.lens, initial=0))
        return [row for text in self.alive for row in range(starts[text], starts[text + 1])]


@dataclass(frozen=True, eq=False)
class PackedSources:
    """What the rows of texts read of the sources that they belong to.

    Attributes:
        keys_values: [sum(lens), blocks, 2, heads, head_dim], keys before values.
        lens: rows of each source.
        query_lens: rows of texts that go on and read each source, in order.
    """

    keys_values: Tensor
    lens: Sequence[int]
    query_lens: Sequence[int]

    def of_block(self, place: int) -> PackedSources:
        """What one block reads."""
        span = self.keys_values[:, place : place + 1]
        return PackedSources(span, self.lens, self.query_lens)


@register_op
def packed_blocks(
    hidden: Tensor,
    blocks: Sequence[Callable[..., Tensor]],
    texts: PackedTexts,
    sources: PackedSources | None = None,
    is_attended: bool = False,
) -> Tensor:
    """Run blocks one after the other over packed texts, every row seeing its whole text.

    Rows that stay as they are give keys and values to the others. Backends for half precision may
    keep what lies between input and result in float32. Running two spans one after the other gives
    the same bits as running both in one call, and a text's result does not depend on the others.

    Args:
        hidden: [sum(texts.lens), hidden] in the dtype of the weights, or what an earlier span gave.
        blocks: at least one ``layers.block.Block``, whose parts a backend reads; its weights stay
            where they are from the first call on.
        texts: how the rows lie, and which of them go on.
        sources: what blocks with cross-attention read.
        is_attended: whether ``hidden`` is what the first block's self-attention gave, its norm
            included; all rows then go on.

    Returns:
        A new tensor of the shape of ``hidden``, in its dtype or in float32.

    Source: Vaswani et al. 2017, arXiv:1706.03762, 3.1; rows that stay: Li et al. 2022,
        arXiv:2210.13304.
    """
    for place, block in enumerate(blocks):
        own: Any = block
        read = None if sources is None else sources.of_block(place)
        hidden = own.packed(hidden, texts, read, is_attended=is_attended and place == 0)
    return hidden


def _has_matrices_to_stream(
    hidden: Tensor, blocks: Sequence[Any], *_: object, **__: object
) -> bool:
    """Whether the GPU's kernels read the matrices: all of a model's, or none."""
    return is_plain(hidden) and is_streamed(blocks[0].attention.qkv.weight)


packed_blocks.backend(
    "triton",
    "multiexit_engine.kernels.packed_blocks:packed_blocks",
    device="cuda",
    supports=_has_matrices_to_stream,
)
packed_blocks.backend(
    "cpu",
    "multiexit_engine._native:packed_blocks",
    device="cpu",
    supports=lambda hidden, *_, **__: is_plain(hidden),
)
