"""Tokens straight from hidden states: head, contrast and choice as one op.

For rows whose request asks for nothing between logits and choice but changes of single tokens'
scores, top-k, top-p and min-p, a backend need not bring logits to memory.
Knows nothing of layers or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.ops.best_tokens import BestTokens, tell_best
from multiexit_engine.ops.contrast import contrast_heads, contrast_logits
from multiexit_engine.ops.edits import Edits, edited_scores
from multiexit_engine.ops.heads import head_logits
from multiexit_engine.ops.narrowing import Narrowing, narrowed_scores
from multiexit_engine.ops.operands import (
    are_rows,
    fits_ring,
    is_dense_or_coded,
    is_plain,
    is_streamable,
)
from multiexit_engine.ops.registry import register_op
from multiexit_engine.ops.sampling import gumbel_noise
from multiexit_engine.quantization import Weight


@register_op
def head_tokens(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row from the logits of one head.

    Greedy rows take the argmax, others a sample of ``softmax(logits / temperature)``; of equals
    the lowest id. A row's token does not depend on the other rows, up to the rounding of logits.

    Args:
        hidden: [rows, hidden_size] normalised hidden states, any float dtype.
        weight: [vocab, hidden_size] of the same dtype and device, or quantized.
        bias: [vocab] added to every row's logits, or None.
        temperature: [rows] float32; 0 is greedy.
        seeds: [rows] int64, see ``gumbel_noise``; not looked at in greedy rows.
        positions: [rows] int64, see ``gumbel_noise``.

    Returns:
        [rows] int64 tokens and [rows] float32 their log-probabilities under ``softmax(logits)``,
        without the temperature (float64 for float64 inputs).

    Source: Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030.
    """
    log_probs = head_logits(hidden, weight, bias).log_softmax(-1)
    return drawn_tokens(log_probs, temperature, seeds, positions)


@register_op
def contrast_tokens(
    upper_hidden: Tensor,
    upper_weight: Weight,
    lower_hidden: Tensor,
    lower_weight: Weight,
    alpha: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row from the contrast of two heads.

    The distribution is that of ``contrast_logits``; the choice is that of ``head_tokens``.

    Args:
        upper_hidden: [rows, hidden_size] normalised hidden states of the later exit.
        upper_weight: [vocab, hidden_size] of its head, same dtype and device, or quantized.
        lower_hidden: [rows, hidden_size] of the earlier exit.
        lower_weight: [vocab, hidden_size] of its head; may be the upper one.
        alpha: [rows] float32, see ``contrast_logits``.
        temperature: [rows] float32 of the contrasted distribution; 0 is greedy.
        seeds: [rows] int64, see ``gumbel_noise``; not looked at in greedy rows.
        positions: [rows] int64, see ``gumbel_noise``.
        num_candidates: [rows] int32 that is overwritten with the number of plausible tokens of each
            row, or None.

    Returns:
        [rows] int64 tokens and [rows] float32 their log-probabilities under the contrasted
        distribution, without the temperature (float64 for float64 inputs).

    Source: Gera et al. 2023, arXiv:2305.01628, eq. 3, for the distribution; Maddison et al. 2014,
        arXiv:1411.0030, for the choice.
    """
    log_probs = contrast_heads(
        upper_hidden, upper_weight, lower_hidden, lower_weight, alpha, None, num_candidates
    )
    return drawn_tokens(log_probs, temperature, seeds, positions)


class RowGroup(NamedTuple):
    """Consecutive rows of a shared head that are contrasted with one lower head, or with none.

    Attributes:
        num_rows: how many rows.
        lower_hidden: [num_rows, hidden_size] of the earlier exit, or None.
        lower_weight: [vocab, hidden_size] of its head, may be quantized, or None.
        lower_bias: [vocab] of its logits, or None.
    """

    num_rows: int
    lower_hidden: Tensor | None = None
    lower_weight: Weight | None = None
    lower_bias: Tensor | None = None


@register_op
def shared_head_tokens(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    groups: Sequence[RowGroup],
    alpha: Tensor,
    min_candidates: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_candidates: Tensor | None = None,
    *,
    edits: Edits | None = None,
    narrowing: Narrowing | None = None,
    best: BestTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row where rows share a head but not what it is contrasted with.

    Equal to ``head_tokens`` and ``contrast_tokens`` of each group; a backend reads the shared head
    once for all of them.

    Args:
        hidden: [rows, hidden_size] normalised hidden states, each of its own exit.
        weight: [vocab, hidden_size] of the shared head, same dtype and device, or quantized.
        bias: [vocab] added to every row's logits, or None.
        groups: the rows in order, each in one of them.
        alpha: [rows] float32, see ``contrast_logits``; not looked at in rows without lower head.
        min_candidates: [rows] int64, see ``contrast_logits``; None: 1 in every row.
        temperature: [rows] float32; 0 is greedy.
        seeds: [rows] int64, see ``gumbel_noise``; not looked at in greedy rows.
        positions: [rows] int64, see ``gumbel_noise``.
        num_candidates: [rows] int32 that is overwritten with the number of plausible tokens of each
            row, 0 of one that is not contrasted; or None.
        edits: what is done to scores before a token is chosen: to the logits of rows without lower
            head, to the log-probabilities of others. None: nothing.
        narrowing: the tokens that may be drawn, after edits and temperature, in rows that are not
            greedy. None: all.
        best: takes the best tokens of rows that ask for them. None: nobody does.

    Returns:
        [rows] int64 tokens and [rows] float32 their log-probabilities, as those ops give them,
        before any edit; -inf where the edits leave no token (float64 for float64 inputs).

    Source: as ``head_tokens`` and ``contrast_tokens``; ``narrowed_scores`` for what may be drawn.
    """
    parts = []
    start = 0
    for group in groups:
        rows = slice(start, start + group.num_rows)
        least = None if min_candidates is None else min_candidates[rows]
        counts = None if num_candidates is None else num_candidates[rows]
        parts.append(_group_scores(hidden[rows], weight, bias, group, alpha[rows], least, counts))
        start = rows.stop
    scores = torch.cat(parts)
    log_probs = scores.log_softmax(-1)
    edited = log_probs if edits is None else edited_scores(scores, edits)
    tokens, left = drawn_tokens(edited, temperature, seeds, positions, narrowing)
    if best is not None:
        tell_best(best, log_probs, tokens)
    if edits is None:
        return tokens, left
    log_probs = log_probs.gather(1, tokens[:, None])[:, 0]
    return tokens, torch.where(left == -torch.inf, left, log_probs)


def _group_scores(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    group: RowGroup,
    alpha: Tensor,
    least: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    _, lower_hidden, lower_weight, lower_bias = group
    if lower_hidden is None or lower_weight is None:
        if counts is not None:
            counts.zero_()
        return head_logits(hidden, weight, bias)
    if bias is None and lower_bias is None:
        return contrast_heads(hidden, weight, lower_hidden, lower_weight, alpha, least, counts)
    upper = head_logits(hidden, weight, bias)
    lower = head_logits(lower_hidden, lower_weight, lower_bias)
    return contrast_logits(upper, lower, alpha, least, counts)


def drawn_tokens(
    log_probs: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    narrowing: Narrowing | None = None,
) -> tuple[Tensor, Tensor]:
    """The choice of ``head_tokens`` from [rows, vocab] log-probabilities."""
    sampled = (temperature > 0)[:, None]
    heat = torch.where(sampled, temperature[:, None], 1.0)
    scores = log_probs / heat
    if narrowing is not None:
        scores = torch.where(sampled, narrowed_scores(scores, narrowing), scores)
    if log_probs.device.type != "cpu" or bool(sampled.any()):
        noise = gumbel_noise(seeds, positions, log_probs.shape[1])
        scores = scores + torch.where(sampled, noise, 0.0)
    tokens = scores.argmax(-1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def _head_streams(hidden: Tensor, weight: Weight, *_: object, **__: object) -> bool:
    return is_dense_or_coded([hidden], [weight])


def _heads_stream(
    upper_hidden: Tensor,
    upper_weight: Weight,
    lower_hidden: Tensor,
    lower_weight: Weight,
    *_: object,
    **__: object,
) -> bool:
    return is_dense_or_coded([upper_hidden, lower_hidden], [upper_weight, lower_weight])


def _head_fits_ring(hidden: Tensor, weight: Weight, *_: object, **__: object) -> bool:
    return fits_ring(hidden, weight)


def _heads_fit_ring(
    upper_hidden: Tensor,
    upper_weight: Weight,
    lower_hidden: Tensor,
    lower_weight: Weight,
    *_: object,
    **__: object,
) -> bool:
    return fits_ring(upper_hidden, upper_weight, lower_weight)


head_tokens.backend(
    "cuda",
    "multiexit_engine._cuda.built:head_tokens",
    device="cuda",
    supports=_head_fits_ring,
)
contrast_tokens.backend(
    "cuda",
    "multiexit_engine._cuda.built:contrast_tokens",
    device="cuda",
    supports=_heads_fit_ring,
)


def _shared_reads(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    groups: Sequence[RowGroup],
    *_: object,
    edits: Edits | None = None,
    narrowing: Narrowing | None = None,
    best: BestTokens | None = None,
) -> bool:
    is_read = is_plain(hidden, weight) and is_streamable(weight, *lower_weights(groups))
    return edits is None and narrowing is None and best is None and is_read


def lower_weights(groups: Sequence[RowGroup]) -> list[Weight]:
    """What groups are contrasted with."""
    return [group.lower_weight for group in groups if group.lower_weight is not None]


def _lower_states(groups: Sequence[RowGroup]) -> list[Tensor]:
    return [group.lower_hidden for group in groups if group.lower_hidden is not None]


head_tokens.backend(
    "triton",
    "multiexit_engine.kernels.heads:head_tokens",
    device="cuda",
    supports=_head_streams,
)
contrast_tokens.backend(
    "triton",
    "multiexit_engine.kernels.heads:contrast_tokens",
    device="cuda",
    supports=_heads_stream,
)
head_tokens.backend(
    "cpu",
    "multiexit_engine._native:head_tokens",
    device="cpu",
    supports=lambda hidden, weight, *_, **__: is_plain(hidden, weight) and are_rows(weight),
)
contrast_tokens.backend(
    "cpu",
    "multiexit_engine._native:contrast_tokens",
    device="cpu",
    supports=lambda upper_hidden, upper_weight, lower_hidden, lower_weight, *_, **__: (
        is_plain(upper_hidden, lower_hidden, upper_weight)
        and is_streamable(upper_weight, lower_weight)
    ),
)
shared_head_tokens.backend(
    "triton",
    "multiexit_engine.kernels.heads:shared_head_tokens",
    device="cuda",
    supports=lambda hidden, weight, bias, groups, *_, **__: (
        is_dense_or_coded([hidden, *_lower_states(groups)], [weight, *lower_weights(groups)])
        # of the lower logits' bias kernels know that of the upper ones only
        and all(g.lower_bias is None or g.lower_bias is bias for g in groups)
    ),
)
shared_head_tokens.backend(
    "cpu",
    "multiexit_engine._native:shared_head_tokens",
    device="cpu",
    supports=_shared_reads,
)
