"""Storing keys and values in the paged cache. Knows nothing of who owns a block."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.launch import options


@triton.jit
def _write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_ptr,
    key_stride,
    value_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    key = tl.load(key_ptr + token * key_stride + columns, mask=mask, other=0.0)  # [BLOCK]
    value = tl.load(value_ptr + token * value_stride + columns, mask=mask, other=0.0)  # [BLOCK]
    tl.store(key_cache_ptr + slot * WIDTH + columns, key, mask=mask)
    tl.store(value_cache_ptr + slot * WIDTH + columns, value, mask=mask)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See ``multiexit_engine.ops.kv``. One launch, one program for each token."""
    tokens, heads, head_dim = key.shape
    if not tokens:
        return
    _write_kernel[(tokens,)](
        token_rows(key),
        token_rows(value),
        key_cache,
        value_cache,
        slot_mapping,
        token_rows(key).stride(0),
        token_rows(value).stride(0),
        WIDTH=heads * head_dim,
        BLOCK=triton.next_power_of_2(heads * head_dim),
        **options(4),
    )


def token_rows(tensor: Tensor) -> Tensor:
    """The same tensor if every token's heads lie side by side, else a copy."""
    side_by_side = tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    return tensor if side_by_side else tensor.contiguous()
