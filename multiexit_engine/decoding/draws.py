"""How the token of each row is drawn, and the ops that draw it from the operands of heads.

Knows nothing of plans, of requests, or of how hidden states came to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.ops import (
    contrast_tokens,
    head_tokens,
    sample_tokens,
    shared_head_tokens,
)
from multiexit_engine.ops.best_tokens import BestTokens
from multiexit_engine.ops.edits import Edits
from multiexit_engine.ops.narrowing import Narrowing
from multiexit_engine.ops.tokens import RowGroup


class Draws(NamedTuple):
    """How the token of each row is drawn.

    Attributes:
        temperature: [rows] float32; 0 is greedy.
        seeds: [rows] int64.
        positions: [rows] int64, see ``gumbel_noise``.
        narrowing: what is drawn from, see ``Narrowing``; None: from all tokens in every row.
    """

    temperature: Tensor
    seeds: Tensor
    positions: Tensor
    narrowing: Narrowing | None = None

    def rows(self, index: Tensor | slice) -> Draws:
        """Those of some rows."""
        narrowing = None if self.narrowing is None else self.narrowing.rows(index)
        temperature, seeds, positions = (column[index] for column in self.columns)
        return Draws(temperature, seeds, positions, narrowing)

    def later(self, num_tokens: int, count: int) -> Draws:
        """Of the first ``count`` rows, so many tokens later."""
        temperature, seeds, positions, narrowing = self.rows(slice(count))
        return Draws(temperature, seeds, positions + num_tokens, narrowing)

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """What every op that chooses tokens takes."""
        return self.temperature, self.seeds, self.positions


def tokens_in_order(scores: Tensor, draws: Draws, count: int) -> Tensor:
    """The token that a draw gives, then that of the same draw without the ones before.

    Args:
        scores: [rows, vocab] float32.
        draws: how each row's tokens are drawn; nothing narrows them.
        count: how many tokens, at most the vocabulary.

    Returns:
        [rows, count] int64, different ones in each row.

    Source: the order of Gumbel-max keys, Kool et al. 2019, arXiv:1903.06059.
    """
    is_drawn = draws.temperature > 0
    if scores.device.type == "cpu" and not bool(is_drawn.any()):
        return scores.topk(count, -1).indices
    scores = scores / torch.where(is_drawn, draws.temperature, 1.0)[:, None]
    tokens: list[Tensor] = []
    for _ in range(count):
        drawn = sample_tokens(scores, draws.seeds, draws.positions)
        tokens.append(torch.where(is_drawn, drawn, scores.argmax(-1))[:, None])
        scores = scores.scatter(1, tokens[-1], -math.inf)
    return torch.cat(tokens, 1)


def pair_tokens(
    upper: HeadOperands,
    lower: HeadOperands | None,
    alpha: Tensor | None,
    draws: Draws,
    num_candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``mode_tokens`` of rows that all have one head, or the contrast of the same two.

    Args:
        upper: the head.
        lower: what it is contrasted with, if anything; neither head has a bias then.
        alpha: [rows] float32, see ``contrast_logits``; with ``lower`` only.
        draws: how each row's token is drawn.
        num_candidates: [rows] int32 that takes the sizes of plausible sets; with ``lower`` only.
    """
    if draws.narrowing is not None:
        group = RowGroup(len(upper.hidden), *(lower or ()))
        return shared_tokens(upper, [group], alpha, None, draws, num_candidates)
    if lower is None or alpha is None:
        return head_tokens(*upper, *draws.columns)
    return contrast_tokens(
        upper.hidden,
        upper.weight,
        lower.hidden,
        lower.weight,
        alpha,
        *draws.columns,
        num_candidates=num_candidates,
    )


def group_tokens(
    upper: HeadOperands,
    groups: Sequence[RowGroup],
    alpha: Tensor,
    least: Tensor | None,
    draws: Draws,
    num_candidates: Tensor,
    edits: Edits | None,
    best: BestTokens | None,
) -> tuple[Tensor, Tensor]:
    """``shared_tokens``, by the op that is made for it where nothing but tokens is wanted.

    ``num_candidates`` holds zeros.
    """
    is_token_all = least is None and edits is None and best is None
    _, hidden, weight, bias = groups[0]
    if is_token_all and all(group.lower_weight is None for group in groups):
        return pair_tokens(upper, None, None, draws, num_candidates)
    is_pair = len(groups) == 1 and upper.bias is None and bias is None
    if is_token_all and is_pair and hidden is not None and weight is not None:
        return pair_tokens(upper, HeadOperands(hidden, weight, bias), alpha, draws, num_candidates)
    return shared_tokens(upper, groups, alpha, least, draws, num_candidates, edits, best)


def shared_tokens(
    upper: HeadOperands,
    groups: Sequence[RowGroup],
    alpha: Tensor | None,
    least: Tensor | None,
    draws: Draws,
    num_candidates: Tensor | None,
    edits: Edits | None = None,
    best: BestTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """The op ``shared_head_tokens``; ``alpha`` may be None where no group has a lower head."""
    alpha = draws.temperature if alpha is None else alpha
    return shared_head_tokens(
        *upper,
        groups,
        alpha,
        least,
        *draws.columns,
        num_candidates,
        edits=edits,
        narrowing=draws.narrowing,
        best=best,
    )
