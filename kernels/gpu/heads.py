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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from multiexit_engine.kernels.head_edits import pack_edits
from multiexit_engine.kernels.head_finish import contrast_finish_kernel, head_finish_kernel
from multiexit_engine.kernels.head_rows import (
    Best,
    Changes,
    Drawing,
    Lower,
    Narrowing,
    Upper,
    lower_of,
)
from multiexit_engine.kernels.head_tiles import head_kernel
from multiexit_engine.kernels.launch import kept_scratch, options, overlaps_launches
from multiexit_engine.kernels.matrices import Matrix, Stored, stored

# Rows of one launch: bounds the scratch of the candidates and the registers of a tile.
MAX_ROWS = 64
_UNCHANGED = Changes()


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
        # one tile for any number of rows: sums of another order would be other bits
        return HeadConfig(32, 16, 32, 4, 4)
    if rows <= 16:
        return HeadConfig(32, 16, 128, 4, 4, 128)
    if rows <= 32:
        return HeadConfig(32, 32, 128, 6, 8, 128)
    return HeadConfig(32, 64, 64, 6, 8, 128)


def mixed_config(rows: int, dtype: torch.dtype, has_all: bool = False) -> HeadConfig:
    """``head_config`` of rows with lower heads of their own, with changes, or beside codes.

    Which need more registers. Of 8 warps one program fits a multiprocessor with 168 as with 255;
    float32 is cut alike for all rows, and spills under triton 3.6 with fewer.
    """
    config = head_config(rows, dtype)
    is_large = has_all or config.num_warps == 8 or dtype == torch.float32
    return config._replace(max_registers=255 if is_large else 168)


def stages_for(weight: Stored, config: HeadConfig, dtype: torch.dtype) -> int:
    """Loads in flight; beside codes float32 rows that have all changes leave registers for two."""
    is_full = dtype == torch.float32 and config.max_registers == 255
    return 2 if is_full and weight.group else weight.stages(config.num_stages)


def finish_config(edited: bool, narrowed: bool, told: bool) -> dict[str, int]:
    """Listed tiles that the last kernel reads at once, its warps and its registers: no spills."""
    if not narrowed:
        return {"LISTED": 128, **options(8, 255 if told else 144)}
    return {"LISTED": 64, **options(8, 255)} if edited else {"LISTED": 128, **options(16, 128)}


def head_tokens(
    hidden: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.tokens``. Two launches for each 64 rows."""
    return _choose(Upper(hidden, weight, bias), None, Drawing(temperature, seeds, positions))


def contrast_tokens(
    upper_hidden: Tensor,
    upper_weight: Matrix,
    lower_hidden: Tensor,
    lower_weight: Matrix,
    alpha: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.tokens``. Two launches for each 64 rows.

    Scratch: 8 bytes for each row and vocabulary entry, touched where tokens may be plausible only.
    """
    upper = Upper(upper_hidden, upper_weight, None)
    lower = Lower(lower_hidden, lower_weight, alpha, num_candidates=num_candidates)
    return _choose(upper, lower, Drawing(temperature, seeds, positions))


def shared_head_tokens(
    hidden: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    groups: Sequence[Any],
    alpha: Tensor,
    min_candidates: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: Tensor | None = None,
    *,
    edits: Any = None,
    narrowing: Any = None,
    best: Any = None,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.tokens``. Two launches for each 64 rows, whatever the groups.

    A lower head is read where a row of its own has a candidate. Rows with ``min_candidates`` other
    than 1 read their lower head in full. Of the biases of lower heads it knows the shared head's
    own. Tokens whose scores are edited are listed as candidates are, with their logits; the last
    launch edits them. Scratch as for ``contrast_tokens``; a row that is narrowed writes all of its
    logits there, and reads those of tiles that can hold tokens which are kept; so does a row that
    lists its best tokens, of which the last launch finds one after the other.
    """
    changes = Changes(
        None if edits is None else pack_edits(edits, weight.shape[0]),
        None if narrowing is None else Narrowing(*narrowing),
        None if best is None else Best(*best),
    )
    is_plain = not any(changes.kinds.values())
    lower = lower_of(groups, hidden, bias, alpha, min_candidates, is_plain)
    if lower is not None:
        lower = lower._replace(num_candidates=num_candidates)
    elif num_candidates is not None:
        num_candidates.zero_()
    drawing = Drawing(temperature, seeds, positions)
    return _choose(Upper(hidden, weight, bias), lower, drawing, changes)


def _choose(
    upper: Upper,
    lower: Lower | None,
    drawing: Drawing,
    changes: Changes = _UNCHANGED,
) -> tuple[Tensor, Tensor]:
    rows, device = upper.hidden.shape[0], upper.hidden.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    for start in range(0, rows, MAX_ROWS):
        part = slice(start, start + MAX_ROWS)
        _choose_part(
            upper._replace(hidden=upper.hidden[part]),
            None if lower is None else lower.rows(part),
            Drawing(*(column[part] for column in drawing)),
            changes.rows(part),
            tokens[part],
            logprobs[part],
        )
    return tokens, logprobs


def _choose_part(
    upper: Upper,
    lower: Lower | None,
    drawing: Drawing,
    changes: Changes,
    tokens: Tensor,
    logprobs: Tensor,
) -> None:
    rows, width = upper.hidden.shape
    vocab, device = upper.weight.shape[0], upper.hidden.device
    is_mixed = lower is not None and lower.groups is not None
    edits, narrowing, best = changes
    is_changed = any(changes.kinds.values())
    own = stored(upper.weight)
    config = head_config(rows, upper.hidden.dtype)
    if is_mixed or is_changed or own.bits:
        has_all = is_mixed and edits is not None and (narrowing or best) is not None
        config = mixed_config(rows, upper.hidden.dtype, has_all)
    num_tiles = triton.cdiv(vocab, config.block_v)
    overlap = overlaps_launches(device)
    num_fields = 4 if narrowing is None else 5
    stats = torch.empty(num_fields, rows, num_tiles, dtype=torch.float32, device=device)
    firsts = torch.empty(rows, num_tiles, dtype=torch.int32, device=device)
    candidates: tuple[Tensor, ...] = (stats, firsts, firsts, stats, stats)
    if lower is not None or is_changed:
        running, count = kept_scratch("heads", [-math.inf, 0.0], MAX_ROWS, device)
        lists = torch.empty(rows, num_tiles, dtype=torch.int32, device=device)
        pairs = torch.empty(2, rows, num_tiles * config.block_v, dtype=torch.float32, device=device)
        candidates = (running, count.view(torch.int32), lists, pairs[0], pairs[1])
    below: tuple[Tensor | None, ...] = (upper.hidden, own.numbers, own.scales, None, None)
    alpha = listing = drawing.temperature
    if lower is not None:
        alpha = listing = lower.alpha
        if lower.least is not None:
            # alpha 0 lists every token, as the least number of candidates is known at the end only
            listing = alpha.masked_fill(lower.least != 1, 0.0)
        lower_own = stored(lower.weight)
        lower_parts = lower_own.numbers, lower_own.scales
        below = (lower.hidden, *lower_parts, lower.table, lower.groups)
    head_kernel[(triton.cdiv(rows, config.block_r), num_tiles)](
        upper.hidden,
        own.numbers,
        own.scales,
        upper.bias,
        *below,
        listing,
        *drawing,
        *candidates,
        stats,
        firsts,
        *((None, None) if edits is None else (edits.edited, edits.allowed)),
        *(narrowing or (None, None, None)),
        None if best is None else best.asked,
        rows,
        0 if lower is None or lower.table is None else lower.table.shape[0],
        vocab,
        width,
        *own.strides,
        **own.constants,
        EVEN=width % config.block_k == 0,
        HAS_BIAS=upper.bias is not None,
        CONTRAST=lower is not None,
        MIXED=is_mixed,
        **changes.kinds,
        BLOCK_V=config.block_v,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
        STAGES=stages_for(own, config, upper.hidden.dtype),
        OVERLAP=overlap,
        **options(config.num_warps, config.max_registers),
    )
    tail = {"TILES": triton.next_power_of_2(num_tiles), "OVERLAP": overlap}
    if overlap:
        tail["launch_pdl"] = True
    if lower is None and not is_changed:
        head_finish_kernel[(rows,)](
            stats, firsts, tokens, logprobs, rows, num_tiles, vocab, **tail, **options(4)
        )
        return
    contrast_finish_kernel[(rows,)](
        *((None,) * 7 if edits is None else edits),
        *(narrowing or (None, None, None)),
        *(best or (None, None, None, None)),
        None if lower is None else lower.groups,
        None if lower is None else lower.least,
        alpha,
        *drawing,
        *candidates,
        stats,
        firsts,
        tokens,
        logprobs,
        None if lower is None else lower.num_candidates,
        rows,
        num_tiles,
        vocab,
        0 if best is None else best.ids.shape[1],
        BLOCK_V=config.block_v,
        CONTRAST=lower is not None,
        MIXED=is_mixed,
        LEAST=lower is not None and lower.least is not None,
        **changes.kinds,
        **tail,
        **finish_config(*changes.kinds.values()),
    )
