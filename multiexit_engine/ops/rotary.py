"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from multiexit_engine.ops.registry import register_op


@register_op
def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, halves paired as in GPT-NeoX.

    Computed in at least float32: transformers rounds each product to the dtype instead.

    Args:
        query: [tokens, heads, head_dim].
        key: [tokens, kv_heads, head_dim].
        cos: [positions, head_dim / 2], of every position.
        sin: of the same shape.
        positions: [tokens] int64.

    Returns:
        New tensors of the shapes and dtypes of ``query`` and ``key``.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34; ``apply_rotary_pos_emb`` of transformers'
        Llama.
    """
    cos = cos.index_select(0, positions)[:, None]
    sin = sin.index_select(0, positions)[:, None]
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
