"""What rows of a step gave, from the device's numbers once they are on the host.

Reads numbers that somebody else made and waited for. Knows nothing of heads or of how a token is
chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from torch import Tensor

from multiexit_engine.batch import StepOutput
from multiexit_engine.request import ChosenToken, ScoredToken
from multiexit_engine.runtime.rows.logit_rows import LogitRow

NOT_A_NUMBER = "its mode gave NaN as the score of a token"
NO_TOKEN_LEFT = "its mode and its parameters together leave no token to choose"
NO_TOKEN_IN_FORM = "its structured_outputs and its other parameters together leave no token"

# what a row gave: its token (``n`` of them after a prompt), or why it has none
Choice: TypeAlias = list[ChosenToken] | str

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Coming(Generic[T]):
    """What rows of a step give, on its way to the host.

    Attributes:
        rows: for each token that is chosen the row that it is for.
        tokens: [rows] int64, these tokens on the device; None where there are none.
        read: gives each row's result once the device was waited for; what is nobody's own result
            (failures, candidates of beams and of contrasts) goes to the output.
    """

    rows: Sequence[LogitRow]
    tokens: Tensor | None
    read: Callable[[StepOutput], list[tuple[LogitRow, T]]]


def direct_choices(
    rows: Sequence[LogitRow],
    tokens: list[int],
    logprobs: list[float],
    best: Sequence[list[Any]] = (),
) -> list[tuple[LogitRow, Choice]]:
    """What rows gave whose distributions nobody looked at.

    Args:
        rows: that chose.
        tokens: of each.
        logprobs: of these tokens, as ``mode_tokens`` has them.
        best: ids, log-probabilities and ranks of a ``BestTokens``, where some row asked for them.
    """
    ids, values, ranks = best or ([], [], [])
    told = [values, ids, logprobs, ranks]
    choices: list[tuple[LogitRow, Choice]] = []
    for place, (row, logprob) in enumerate(zip(rows, logprobs, strict=True)):
        if math.isnan(logprob):
            choices.append((row, NOT_A_NUMBER))
        elif logprob == -math.inf:
            choices.append((row, _why_no_token(row)))
        else:
            asked = row.sequence.request.sampling.logprobs
            choices.append((row, [_chosen(tokens, told, place, asked)]))
    return choices


def looked_at_choices(
    rows: Sequence[LogitRow],
    copies: Sequence[int],
    tokens: list[int],
    scores: list[float],
    logprobs: list[list[Any]],
) -> list[Choice]:
    """What rows gave whose distributions were looked at.

    Args:
        rows: that chose.
        copies: tokens of each of them.
        tokens: of all rows, one after the other.
        scores: of these tokens, after all that was done to them.
        logprobs: as ``token_logprobs`` gives them, or nothing.
    """
    start = 0
    choices: list[Choice] = []
    for row, count in zip(rows, copies, strict=True):
        own, start = range(start, start + count), start + count
        if any(math.isnan(scores[i]) for i in own):
            choices.append(NOT_A_NUMBER)
            continue
        if any(scores[i] == -math.inf for i in own):
            choices.append(_why_no_token(row))
            continue
        asked = row.sequence.request.sampling.logprobs
        choices.append([_chosen(tokens, logprobs, i, asked) for i in own])
    return choices


def with_layers(
    chosen: list[tuple[LogitRow, Choice]], rows: Sequence[LogitRow], layers: list[int]
) -> list[tuple[LogitRow, Choice]]:
    """What the rows gave, with the layers that DoLa contrasted them with, -1 for none."""
    layer_of = dict(zip(map(id, rows), layers, strict=True))
    return [
        (row, choice if isinstance(choice, str) else [t.after(layer_of[id(row)]) for t in choice])
        for row, choice in chosen
    ]


def scored_tokens(
    rows: Sequence[LogitRow], greedy: list[int], logprobs: list[list[Any]], output: StepOutput
) -> list[tuple[LogitRow, ScoredToken]]:
    """The scores of the rows' given tokens; NaN is a failure of its request.

    Args:
        rows: that score.
        greedy: the best token of each.
        logprobs: as ``token_logprobs`` gives them.
        output: takes the failures.
    """
    targets = [row.target or 0 for row in rows]
    results: list[tuple[LogitRow, ScoredToken]] = []
    for i, row in enumerate(rows):
        request = row.sequence.request
        chosen = _chosen(targets, logprobs, i, request.sampling.prompt_logprobs or 0)
        assert chosen.logprob is not None and chosen.rank is not None
        if math.isnan(chosen.logprob):
            output.failures[request.request_id] = NOT_A_NUMBER
        scored = ScoredToken(
            chosen.token_id,
            chosen.logprob,
            chosen.rank,
            greedy[i] == chosen.token_id,
            chosen.alternatives,
        )
        results.append((row, scored))
    return results


def _why_no_token(row: LogitRow) -> str:
    grammar = row.sequence.grammar
    if grammar is not None and grammar.error:
        return f"its grammar failed: {grammar.error}"
    return NO_TOKEN_LEFT if grammar is None else NO_TOKEN_IN_FORM


def _chosen(
    tokens: list[int], logprobs: list[list[Any]], row: int, asked: int | None
) -> ChosenToken:
    """One row of a step's results; ``logprobs`` as ``token_logprobs`` gives them, or nothing."""
    if asked is None:
        return ChosenToken(tokens[row])
    values, ids, own, ranks = logprobs
    count = len(ids[row]) if asked == -1 else asked
    best = tuple(zip(ids[row][:count], values[row][:count], strict=True))
    return ChosenToken(tokens[row], own[row], ranks[row], best)
