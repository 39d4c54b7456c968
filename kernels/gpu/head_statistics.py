"""What gates ask of a head: best token, runner-up and entropy of each row, without logits.

The head is streamed once for a block of rows; what a tile says of a row is six numbers, joined in
a fixed order. Knows nothing of exits or thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multiexit_engine.kernels.head_lists import first_best
from multiexit_engine.kernels.head_tiles import best_of, head_logits_tile
from multiexit_engine.kernels.heads import head_config
from multiexit_engine.kernels.launch import options
from multiexit_engine.kernels.matrices import Matrix, stored
from multiexit_engine.kernels.row_lists import RowList, rows_at

_NO_TOKEN = tl.constexpr(2147483647)
_NUM_FIELDS = 4


class HeadStatistics(NamedTuple):
    """The fields of the op's result, which kernels do not know: all [rows]."""

    tokens: Tensor
    log_probs: Tensor
    second_log_probs: Tensor
    log_sum_exp: Tensor
    entropy: Tensor


def head_statistics(
    hidden: Tensor, weight: Matrix, bias: Tensor | None = None, shortlist: int | None = None
) -> HeadStatistics:
    """See ``multiexit_engine.ops.heads``. Two launches; scratch of 20 bytes a row and tile."""
    return _statistics(hidden, weight, bias, shortlist, None)


def listed_head_statistics(
    hidden: Tensor, weight: Matrix, bias: Tensor | None, listed: RowList
) -> HeadStatistics:
    """See ``multiexit_engine.ops.row_lists``. Two launches."""
    return _statistics(hidden, weight, bias, None, listed)


def _statistics(
    hidden: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    shortlist: int | None,
    listed: RowList | None,
) -> HeadStatistics:
    rows, width = hidden.shape
    vocab, device = weight.shape[0] if shortlist is None else shortlist, hidden.device
    if not 1 <= vocab <= weight.shape[0]:
        raise ValueError(
            f"shortlist={shortlist}: the head has {weight.shape[0]} tokens, take 1 to all of them"
        )
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    numbers = torch.empty(_NUM_FIELDS, rows, dtype=torch.float32, device=device)
    which = (None, None) if listed is None else (listed.rows, listed.count)
    if rows:
        config, own = head_config(rows, hidden.dtype), stored(weight)
        num_tiles = triton.cdiv(vocab, config.block_v)
        shape = (_NUM_FIELDS, rows, num_tiles)
        fields = torch.empty(shape, dtype=torch.float32, device=device)
        best = torch.empty(shape[1:], dtype=torch.int32, device=device)
        statistics_kernel[(triton.cdiv(rows, config.block_r), num_tiles)](
            hidden, own.numbers, own.scales, bias, fields, best, *which, rows, vocab, width,
            *own.strides, **own.constants, LISTED=listed is not None,
            EVEN=width % config.block_k == 0, HAS_BIAS=bias is not None,
            BLOCK_V=config.block_v, BLOCK_R=config.block_r, BLOCK_K=config.block_k,
            STAGES=own.stages(config.num_stages),
            **options(config.num_warps, config.max_registers),
        )  # fmt: skip
        statistics_finish_kernel[(rows,)](
            fields, best, tokens, numbers, *which, rows, num_tiles, vocab,
            LISTED=listed is not None, TILES=triton.next_power_of_2(num_tiles), **options(4),
        )  # fmt: skip
    return HeadStatistics(tokens, *numbers)


@triton.jit(do_not_specialize=["num_rows", "vocab"])
def statistics_kernel(
    hidden_ptr,
    head_weight_ptr,
    scale_ptr,
    bias_ptr,
    tile_stat_ptr,
    tile_token_ptr,
    row_ptr,
    count_ptr,
    num_rows,
    vocab,
    width,
    code_stride,
    num_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTED: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the vocabulary for one block of rows.

    Writes for each row and tile the largest logit, the next one, the sum of e = exp(logit -
    largest), the sum of e * (logit - largest), and the first token with the largest logit. LISTED:
    of the rows of a list; a block that the list does not reach reads no weight.
    """
    if LISTED:  # noqa: SIM102 - without a list there is no count
        if tl.program_id(0) * BLOCK_R >= tl.load(count_ptr):
            return
    tile = tl.program_id(1)
    num_tiles = tl.num_programs(1)
    entries = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    places = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, row_mask = rows_at(places, row_ptr, count_ptr, num_rows, LISTED)
    entry_mask = entries < vocab
    logits = head_logits_tile(
        hidden_ptr, head_weight_ptr, scale_ptr, bias_ptr, rows, row_mask, entries, entry_mask,
        width, code_stride, num_groups, BITS, GROUP,
        EVEN, HAS_BIAS, BLOCK_V, BLOCK_R, BLOCK_K, STAGES,
    )  # fmt: skip
    top, token, _ = best_of(logits, logits, entries)  # [BLOCK_R]
    second = tl.max(tl.where(entries[:, None] == token[None, :], float("-inf"), logits), 0)
    # in a tile of impossible tokens -inf - -inf would be NaN
    below = logits - tl.where(top == float("-inf"), 0.0, top)[None, :]
    share = tl.exp(below)
    place = rows.to(tl.int64) * num_tiles + tile
    field = num_rows.to(tl.int64) * num_tiles
    tl.store(tile_stat_ptr + place, top, mask=row_mask)
    tl.store(tile_stat_ptr + field + place, second, mask=row_mask)
    tl.store(tile_stat_ptr + 2 * field + place, tl.sum(share, 0), mask=row_mask)
    weighted = tl.sum(tl.where(share == 0.0, 0.0, share * below), 0)
    tl.store(tile_stat_ptr + 3 * field + place, weighted, mask=row_mask)
    tl.store(tile_token_ptr + place, token, mask=row_mask)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "vocab"])
def statistics_finish_kernel(
    tile_stat_ptr,
    tile_token_ptr,
    token_ptr,
    number_ptr,
    row_ptr,
    count_ptr,
    num_rows,
    num_tiles,
    vocab,
    LISTED: tl.constexpr,
    TILES: tl.constexpr,
):
    """Join the tiles of one row; a row with NaN or +inf among its logits has NaN in all sums."""
    row = tl.program_id(0).to(tl.int64)
    if LISTED:
        if row >= tl.load(count_ptr):
            return
        row = tl.load(row_ptr + row).to(tl.int64)
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    place = row * num_tiles + tiles
    field = num_rows.to(tl.int64) * num_tiles
    tops = tl.load(tile_stat_ptr + place, mask=mask, other=float("-inf"))  # [TILES]
    seconds = tl.load(tile_stat_ptr + field + place, mask=mask, other=float("-inf"))  # [TILES]
    sums = tl.load(tile_stat_ptr + 2 * field + place, mask=mask, other=0.0)  # [TILES]
    weighted = tl.load(tile_stat_ptr + 3 * field + place, mask=mask, other=0.0)  # [TILES]
    tokens = tl.load(tile_token_ptr + place, mask=mask, other=_NO_TOKEN)  # [TILES]
    top, token = first_best(tops, tokens)
    second = tl.max(tl.where(tokens == token, seconds, tops), 0)
    below = tops - top
    scale = tl.exp(below)
    total = tl.sum(sums * scale, 0)
    lifted = tl.where(tops == float("-inf"), 0.0, scale * (weighted + sums * below))
    log_total = tl.log(total)
    entropy = log_total - tl.sum(lifted, 0) / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    rows = tl.num_programs(0)
    # a row of NaN has no best token; what is stored stays a legal one
    tl.store(token_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))
    tl.store(number_ptr + row, -log_total)
    tl.store(number_ptr + rows + row, (second - top) - log_total)
    tl.store(number_ptr + 2 * rows + row, top + log_total)
    tl.store(number_ptr + 3 * rows + row, entropy)
