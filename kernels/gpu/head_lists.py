"""What the last half of ``heads`` reads of single tokens: listed tiles, and edits of scores.

Knows nothing of how a token is chosen among them.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def candidates(
    listed_ptr, logit_ptr, score_ptr, row, start, count, num_tiles,
    BLOCK_V: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Tokens, logits (-inf: no candidate) and scores of the listed tiles from ``start`` on."""
    index = start + tl.arange(0, LISTED)
    mask = index < count
    tile = tl.load(listed_ptr + row * num_tiles + index, mask=mask, other=0)  # [LISTED]
    token = tile[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    place = row * num_tiles * BLOCK_V + token
    logit = tl.load(logit_ptr + place, mask=mask[:, None], other=float("-inf"))  # [LISTED, BLOCK_V]
    score = tl.load(score_ptr + place, mask=mask[:, None], other=0.0)  # [LISTED, BLOCK_V]
    return token, logit, score


@triton.jit
def first_best(keys, tokens):
    """The largest key of all tiles and the lowest token that has it."""
    key = tl.max(keys, 0)
    return key, tl.min(tl.where(keys == key, tokens, _NO_TOKEN), 0)


@triton.jit
def is_narrowed(top_k, unlikely, min_p, temperature):
    """Whether a row's draw is from a part of its tokens."""
    return (temperature > 0) & ((top_k > 0) | (unlikely >= 0) | (min_p > 0))


@triton.jit
def in_order(x):
    """float32 as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order(x):
    """The float32 of which ``x`` is ``in_order``."""
    bits = x.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _after_edits(
    score, token, mask, row, vocab, edited_ptr, entry_ptr, allowed_ptr, add_ptr, penalty_ptr,
    loss_ptr,
):  # fmt: skip
    """Scores of tokens after the row's edits: a token whose bit is set has numbers somewhere."""
    place = row * ((vocab + 31) // 32) + token // 32
    lane = token % 32
    word = tl.load(edited_ptr + place, mask=mask, other=0)
    allowed = tl.load(allowed_ptr + place, mask=mask, other=0)
    mask = mask & ((word >> lane & 1) != 0)
    index = tl.load(entry_ptr + row * vocab + token, mask=mask, other=0)
    score += tl.load(add_ptr + index, mask=mask, other=0.0)
    penalty = tl.load(penalty_ptr + index, mask=mask, other=1.0)
    score = tl.where(score < 0, score * penalty, score / penalty)
    score -= tl.load(loss_ptr + index, mask=mask, other=0.0)
    return tl.where((allowed >> lane & 1) != 0, score, float("-inf"))


@triton.jit
def edited_score(
    score, base, token, mask, row, vocab, edited_ptr, entry_ptr, allowed_ptr, add_ptr, penalty_ptr,
    loss_ptr,
):  # fmt: skip
    """``_after_edits`` of score - base, with base added: the very score where nothing is edited."""
    changed = _after_edits(
        score - base, token, mask, row, vocab, edited_ptr, entry_ptr, allowed_ptr, add_ptr,
        penalty_ptr, loss_ptr,
    )  # fmt: skip
    return tl.where(changed == score - base, score, base + changed)
