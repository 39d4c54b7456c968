"""DoLa for a group of rows: the mature head against the candidate that differs most from it.

Knows what the heads multiply; nothing of layers, modes or requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from multiexit_engine.decoding.draws import Draws
from multiexit_engine.layers.exit_heads import HeadOperands
from multiexit_engine.ops import dola_tokens, head_logits, js_divergences, relative_top_logits
from multiexit_engine.transfer import to_device

MAX_LOGIT_ROWS = 256  # rows of float32 logits held at once, over all heads


def dola_scores(
    mature: HeadOperands,
    candidates: Sequence[HeadOperands],
    relative_tops: Sequence[float],
    jsd: str,
    allowed: Sequence[Tensor | None] = (),
    chosen: Tensor | None = None,
) -> Tensor:
    """Scores of every row against its own premature layer.

    Of candidates that differ equally much the first is taken. A row depends on itself alone.

    Args:
        mature: of the head that gives the distribution; its hidden states are [rows, hidden].
        candidates: of the premature heads, for the same rows; a single one is not compared.
        relative_tops: plausibility threshold of each row.
        jsd: "exact" or "reference", see ``js_divergences``.
        allowed: for each row [vocab] bool, or None, the tokens that may be chosen, or nothing at
            all: plausible are then those near the best of these.
        chosen: [rows] int64 that takes each row's place among the candidates. None: nobody wants
            to know.

    Returns:
        [rows, vocab] float32, see ``relative_top_logits``.

    Source: Chuang et al. 2023, arXiv:2309.03883, eqs. 2-4; ``_dola_select_contrast`` of
        transformers 4.55 at batch 1.
    """
    tops = to_device(relative_tops, mature.hidden.device, torch.float32)
    parts = []
    for rows, logits in _slices(mature, candidates):
        places = _most_different(logits[0], logits[1:], jsd)
        base = logits[1:][places, torch.arange(len(places), device=places.device)]
        if chosen is not None:
            chosen[rows] = places
        mature_logits = _only(logits[0], allowed[rows])
        parts.append(relative_top_logits(mature_logits, base, tops[rows]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def tokens_of_differences(
    mature: HeadOperands,
    candidates: Sequence[HeadOperands],
    relative_tops: Sequence[float],
    jsd: str,
    draws: Draws,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """The op ``dola_tokens`` of heads; arguments as in ``dola_scores``.

    Args:
        mature: as there.
        candidates: as there.
        relative_tops: as there.
        jsd: as there.
        draws: how each row's token is drawn; nothing narrows them.
        chosen: as there.

    Returns:
        [rows] int64 tokens and [rows] float32 their log-probabilities.
    """
    tops = to_device(relative_tops, mature.hidden.device, torch.float32)
    parts = [
        dola_tokens(logits[0], logits[1:], tops[rows], jsd, *draws.rows(rows).columns, chosen[rows])
        for rows, logits in _slices(mature, candidates)
    ]
    tokens, log_probs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _slices(
    mature: HeadOperands, candidates: Sequence[HeadOperands]
) -> Iterator[tuple[slice, Tensor]]:
    """Rows in order, few enough, and their [1 + candidates, rows, vocab] logits."""
    at_once = max(1, MAX_LOGIT_ROWS // (1 + len(candidates)))
    for start in range(0, len(mature.hidden), at_once):
        rows = slice(start, start + at_once)
        yield rows, _logits([_rows(head, rows) for head in (mature, *candidates)])


def _rows(head: HeadOperands, rows: slice) -> HeadOperands:
    return HeadOperands(head.hidden[rows], head.weight, head.bias)


def _logits(heads: Sequence[HeadOperands]) -> Tensor:
    """[heads, rows, vocab] logits; a matrix that heads in a row share is read once for all."""
    parts = []
    for _, sharing in groupby(heads, key=lambda head: id(head.weight)):
        own = list(sharing)
        hidden = torch.cat([head.hidden for head in own])
        logits = head_logits(hidden, own[0].weight, own[0].bias)
        parts.append(logits.view(len(own), -1, logits.shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _only(logits: Tensor, allowed: Sequence[Tensor | None]) -> Tensor:
    """[rows, vocab] logits, -inf where a token is not allowed."""
    if all(own is None for own in allowed):
        return logits
    rows = zip(logits, allowed, strict=True)
    return torch.stack(
        [row if own is None else row.masked_fill(~own, -math.inf) for row, own in rows]
    )


def _most_different(mature: Tensor, candidates: Tensor, jsd: str) -> Tensor:
    """[rows] int64 places of each row's premature layer among [candidates, rows, vocab] logits."""
    if candidates.shape[0] == 1:
        return torch.zeros(mature.shape[0], dtype=torch.int64, device=mature.device)
    return js_divergences(mature, candidates, jsd).argmax(0)
