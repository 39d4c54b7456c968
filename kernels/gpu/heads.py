"""Tokens straight from hidden states: the vocabulary heads, the contrast and the choice, fused.

Every tile of the vocabulary is multiplied with all rows of a block and reduced at once, so logits
never reach memory, candidates of the contrast apart. Of a lower head only those rows are read
whose tokens may be plausible: all of them where the upper distribution is flat, hence no other
path for that case. Every result is the same in each run: what programs race for is only which
tokens are looked at more closely, and the sums over those are integers.

Knows nothing of exits, requests or of how hidden states are made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from multiexit_engine.kernels.head_finish import contrast_finish_kernel, head_finish_kernel
from multiexit_engine.kernels.head_tiles import head_kernel
from multiexit_engine.kernels.launch import kept_scratch, options, overlaps_launches

# Rows of one launch: bounds the scratch of the candidates and the registers of a tile.
MAX_ROWS = 64


class HeadConfig(NamedTuple):
    """How a head is cut into tiles.

    Attributes:
        block_v: vocabulary rows of a tile.
        block_r: rows of hidden states of a tile; 1 multiplies without tensor cores.
        block_k: hidden width of one step.
        num_stages: loads in flight.
        num_warps: of a program.
        max_registers: of a thread; None leaves them to the compiler.
    """

    block_v: int
    block_r: int
    block_k: int
    num_stages: int
    num_warps: int
    max_registers: int | None = None


def head_config(rows: int, dtype: torch.dtype) -> HeadConfig:
    """The tiles for a number of rows: enough loads in flight, no spills on any GPU we name.

    32 vocabulary rows keep the product off the tensor memory of sm_100, whose layouts the compiler
    cannot reduce inside a branch (triton 3.6 and 3.7 end with an error there from 64 rows on).
    """
    if dtype == torch.float32:
        return HeadConfig(16, 1, 128, 3, 4) if rows == 1 else HeadConfig(32, 16, 64, 3, 4)
    if rows <= 16:
        return HeadConfig(32, 16, 128, 4, 4, 128)
    if rows <= 32:
        return HeadConfig(32, 32, 128, 4, 8)
    return HeadConfig(32, 64, 64, 6, 8, 128)


# Candidate tiles that the last kernel reads at once.
LISTED_AT_ONCE = 128


def head_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.tokens``. Two launches for each 64 rows."""
    return _choose(hidden, weight, bias, None, temperature, seeds, positions)


def contrast_tokens(
    upper_hidden: Tensor,
    upper_weight: Tensor,
    lower_hidden: Tensor,
    lower_weight: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.tokens``. Two launches for each 64 rows.

    Scratch: 8 bytes for each row and vocabulary entry, touched where tokens may be plausible only.
    """
    lower = _Lower(lower_hidden, lower_weight, alpha, num_candidates)
    return _choose(upper_hidden, upper_weight, None, lower, temperature, seeds, positions)


class _Lower(NamedTuple):
    hidden: Tensor
    weight: Tensor
    alpha: Tensor
    num_candidates: Tensor | None

    def rows(self, part: slice) -> _Lower:
        counts = None if self.num_candidates is None else self.num_candidates[part]
        return _Lower(self.hidden[part], self.weight, self.alpha[part], counts)


def _choose(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lower: _Lower | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    for start in range(0, rows, MAX_ROWS):
        part = slice(start, start + MAX_ROWS)
        below = lower and lower.rows(part)
        drawing = (temperature[part], seeds[part], positions[part])
        _choose_part(hidden[part], weight, bias, below, drawing, tokens[part], logprobs[part])
    return tokens, logprobs


def _choose_part(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lower: _Lower | None,
    drawing: tuple[Tensor, Tensor, Tensor],
    tokens: Tensor,
    logprobs: Tensor,
) -> None:
    rows, width = hidden.shape
    vocab, device = weight.shape[0], hidden.device
    config = head_config(rows, hidden.dtype)
    num_tiles = triton.cdiv(vocab, config.block_v)
    overlap = overlaps_launches(device)
    stats = torch.empty(4, rows, num_tiles, dtype=torch.float32, device=device)
    best = torch.empty(rows, num_tiles, dtype=torch.int32, device=device)
    if lower is None:
        candidates: tuple[Tensor, ...] = (stats, best, best, stats, stats)
    else:
        running, count = kept_scratch("heads", [-math.inf, 0.0], MAX_ROWS, device)
        listed = torch.empty(rows, num_tiles, dtype=torch.int32, device=device)
        pairs = torch.empty(2, rows, num_tiles * config.block_v, dtype=torch.float32, device=device)
        candidates = (running, count.view(torch.int32), listed, pairs[0], pairs[1])
    head_kernel[(triton.cdiv(rows, config.block_r), num_tiles)](
        hidden,
        weight,
        bias,
        lower.hidden if lower else hidden,
        lower.weight if lower else weight,
        lower.alpha if lower else drawing[0],
        *drawing,
        *candidates,
        stats,
        best,
        rows,
        vocab,
        width,
        EVEN=width % config.block_k == 0,
        HAS_BIAS=bias is not None,
        CONTRAST=lower is not None,
        BLOCK_V=config.block_v,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        OVERLAP=overlap,
        **options(config.num_warps, config.max_registers),
    )
    tail = {"TILES": triton.next_power_of_2(num_tiles), "OVERLAP": overlap}
    if overlap:
        tail["launch_pdl"] = True
    if lower is None:
        head_finish_kernel[(rows,)](
            stats, best, tokens, logprobs, rows, num_tiles, vocab, **tail, **options(4)
        )
        return
    contrast_finish_kernel[(rows,)](
        lower.alpha,
        *drawing,
        *candidates,
        stats,
        best,
        tokens,
        logprobs,
        lower.num_candidates,
        rows,
        num_tiles,
        vocab,
        BLOCK_V=config.block_v,
        LISTED=LISTED_AT_ONCE,
        **tail,
        **options(8, 128),
    )
