"""Rows of tables: embeddings, and hidden states on their way.

Backends of CPUs are there for their threads: PyTorch's (OpenMP) spin for milliseconds on the cores
that the other kernels need.
"""

from __future__ import annotations

from torch import Tensor

from multiexit_engine.ops.operands import is_streamable
from multiexit_engine.ops.registry import register_op


@register_op
def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a table, in the order asked for, any of them more than once.

    Args:
        table: [table_rows, width].
        rows: [rows] int64 in [0, table_rows); others raise IndexError on the CPU.

    Returns:
        [rows, width].

    Source: ``torch.index_select``.
    """
    return table.index_select(0, rows)


@register_op
def embed(
    token_ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor, scale: float
) -> Tensor:
    """Embeddings of tokens at positions: ``scale * tokens[token_ids] + places[positions]``.

    Args:
        token_ids: [rows] int64 in [0, vocab); others raise IndexError on the CPU.
        positions: [rows] int64 in [0, max_positions); likewise.
        tokens: [vocab, width].
        places: [max_positions, width] of the same dtype.
        scale: factor of the tokens.

    Returns:
        [rows, width].

    Source: Vaswani et al. 2017, arXiv:1706.03762, 3.4 and 3.5; ``BartScaledWordEmbedding`` of
        transformers.
    """
    embedded = tokens.index_select(0, token_ids)
    return (embedded if scale == 1.0 else embedded * scale) + places.index_select(0, positions)


take_rows.backend(
    "cpu",
    "multiexit_engine._native:take_rows",
    device="cpu",
    supports=lambda table, rows: is_streamable(table),
)
embed.backend(
    "cpu",
    "multiexit_engine._native:embed",
    device="cpu",
    supports=lambda token_ids, positions, tokens, places, scale: (
        is_streamable(tokens, places) and tokens.dtype.itemsize == 4
    ),
)
