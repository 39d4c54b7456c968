"""Tokens of heads by rough logits first: exact ones are made of those only that can win.

Knows nothing of layers or requests, or of when codes are worth their memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multiexit_engine.ops.coded_heads import CodedHead, CodedHidden, LogitBounds, rough_logits
from multiexit_engine.ops.contrast import contrast_logits
from multiexit_engine.ops.heads import head_logits
from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import register_op
from multiexit_engine.ops.sampling import gumbel_noise
from multiexit_engine.ops.tokens import RowGroup, drawn_tokens, lower_weights

# Tokens that can win of a row that a backend keeps at least.
MOST_NEAR = 1024


@register_op
def coded_head_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: Sequence[RowGroup],
    alpha: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    states: CodedHidden,
    head: CodedHead,
    bounds: LogitBounds,
    num_candidates: Tensor | None = None,
) -> Tensor:
    """The tokens of ``shared_head_tokens``: rough logits name all that can be, exact ones decide.

    With l <= x <= u the bounds of every logit x, a greedy row's token has u >= max l, a plausible
    token of a contrast u >= max l + log alpha, and the token of a row that is sampled with the
    noise g at the temperature t has u / t + g >= max (l / t + g), where in a contrast the greatest
    is that of tokens which cannot be plausible. Normalisers of whole heads are not needed: of the
    plausible tokens the best is the one whose upper logit exceeds its lower one by most, every
    other token is less likely than that, and beside the logits of others their mass is what the
    upper logits of the plausible ones say.

    Args:
        hidden: [rows, hidden_size].
        weight: [vocab, hidden_size] of the same dtype.
        bias: [vocab] float32 added to the logits, or None.
        groups: as in ``shared_head_tokens``, weights of the same dtype.
        alpha: [rows] float32, as there.
        temperature: [rows] float32, as there.
        seeds: [rows] int64, as there.
        positions: [rows] int64, as there.
        states: codes of ``hidden``.
        head: codes of ``weight``.
        bounds: of their logits.
        num_candidates: [rows] int32 that is overwritten as there, but for rows that are left open;
            or None.

    Returns:
        [rows] int64; of equals the lowest. -1 in a row that is left open: one without finite
        bounds, and perhaps one with more than ``MOST_NEAR`` tokens that can be chosen or are
        plausible, with lower logits that are not finite, or whose two best tokens in a contrast are
        as near as rounding.

    Source: codes as in ``rough_head_sums``; a superset by bounds, then exact scores, as
        branch-and-bound search of greatest inner products, Ram and Gray 2012, arXiv:1202.6101.
    """
    is_contrasted = torch.tensor(
        [g.lower_weight is not None for g in groups for _ in range(g.num_rows)]
    )
    is_sampled = temperature > 0
    heat = torch.where(is_sampled, temperature, 1.0).double()[:, None]
    noise = gumbel_noise(seeds, positions, head.vocab) * is_sampled[:, None]
    rough = rough_logits(states, head, bias).double()
    reach = bounds.reaches.double()[:, None] * head.errors[: head.vocab].double()
    margin = 2 * bounds.slacks[:, None] + 1e-4
    lowest = (rough - reach).amax(1, keepdim=True) + alpha.clamp(0, 1).log()[:, None] - margin
    is_plausible = is_contrasted[:, None] & (rough + reach >= lowest)
    # of a contrast what may be plausible proves nothing about other tokens
    others = ((rough - reach) / heat + noise).masked_fill(is_plausible, -torch.inf)
    lowest = others.amax(1, keepdim=True) - margin / heat
    is_far = ~is_plausible & ((rough + reach) / heat + noise < lowest)
    near = head_logits(hidden, weight, bias).masked_fill(is_far, -torch.inf)
    parts = []
    start = 0
    for group in groups:
        rows = slice(start, start + group.num_rows)
        counts = None if num_candidates is None else num_candidates[rows]
        parts.append(_group_scores(near[rows], group, alpha[rows], counts))
        start = rows.stop
    tokens, _ = drawn_tokens(torch.cat(parts).log_softmax(-1), temperature, seeds, positions)
    return tokens.masked_fill(~bounds.slacks.isfinite(), -1)


def _group_scores(upper: Tensor, group: RowGroup, alpha: Tensor, counts: Tensor | None) -> Tensor:
    _, lower_hidden, lower_weight, lower_bias = group
    if lower_hidden is None or lower_weight is None:
        if counts is not None:
            counts.zero_()
        return upper
    lower = head_logits(lower_hidden, lower_weight, lower_bias)
    return contrast_logits(upper, lower, alpha, None, counts)


coded_head_tokens.backend(
    "cpu",
    "multiexit_engine._native:coded_head_tokens",
    device="cpu",
    supports=lambda hidden, weight, bias, groups, *_, **__: (
        is_plain(hidden, weight) and is_streamable(weight, *lower_weights(groups))
    ),
)
