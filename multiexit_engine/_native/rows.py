"""Rows of tables."""

from __future__ import annotations

import torch
from torch import Tensor

from multiexit_engine import _C


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """See ``multiexit_engine.ops.take_rows``."""
    rows = rows.contiguous()
    out = table.new_empty(rows.shape[0], table.shape[1])
    _C.take_rows(torch.get_num_threads(), _table_rows(table, rows), rows.shape[0], out.data_ptr())
    return out


def embed(
    token_ids: Tensor, positions: Tensor, tokens: Tensor, places: Tensor, scale: float
) -> Tensor:
    """See ``multiexit_engine.ops.embed``."""
    token_ids, positions = token_ids.contiguous(), positions.contiguous()
    out = tokens.new_empty(token_ids.shape[0], tokens.shape[1])
    _C.embed(
        torch.get_num_threads(),
        _table_rows(tokens, token_ids),
        _table_rows(places, positions),
        scale,
        token_ids.shape[0],
        out.data_ptr(),
    )
    return out


def _table_rows(table: Tensor, rows: Tensor) -> _C.TableRows:
    """A view of both, which must outlive it."""
    width = table.shape[1] * table.element_size()
    return _C.TableRows(table.data_ptr(), table.shape[0], width, rows.data_ptr())
