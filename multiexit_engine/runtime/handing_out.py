"""What each sequence of a step gets of the tokens and scores that its rows gave.

Everything is on the host by now. Knows nothing of how a token was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from multiexit_engine.batch import CheckedDrafts, StepOutput
from multiexit_engine.params import Exit
from multiexit_engine.request import ChosenToken, ScoredToken
from multiexit_engine.runtime.chosen_rows import Choice
from multiexit_engine.runtime.logit_rows import LogitRow


def hand_out(
    chosen: Iterable[tuple[LogitRow, Choice]],
    drafts: Mapping[int, Sequence[int]],
    output: StepOutput,
) -> None:
    """Give each sequence what its rows gave: of a drafted one what its drafts were right about.

    Args:
        chosen: rows and what they gave, in any order.
        drafts: of each drafted item.
        output: takes tokens and failures.
    """
    checks: dict[int, list[tuple[LogitRow, Choice]]] = {index: [] for index in drafts}
    for row, choice in chosen:
        if row.item in checks:
            checks[row.item].append((row, choice))
        elif isinstance(choice, str):
            output.failures[row.sequence.request.request_id] = choice
        else:
            output.tokens.append((row.sequence, _with_exit(row, choice)))
    for index, pairs in checks.items():
        pairs.sort(key=lambda pair: pair[0].num_drafts)
        sequence = pairs[0][0].sequence
        tokens = _accepted([choice for _, choice in pairs], drafts[index])
        if isinstance(tokens, str):
            output.failures[sequence.request.request_id] = tokens
        else:
            output.checked.append((sequence, CheckedDrafts(tokens, len(drafts[index]))))


def hand_out_scores(scored: Iterable[tuple[LogitRow, ScoredToken]], output: StepOutput) -> None:
    """Give each request its scores in the order of its prompt."""
    in_order = sorted(scored, key=lambda pair: (pair[0].item, pair[0].position))
    for request, pairs in groupby(in_order, key=lambda pair: pair[0].sequence.request):
        output.scored.append((request, [score for _, score in pairs]))


def _with_exit(row: LogitRow, tokens: list[ChosenToken]) -> list[ChosenToken]:
    """The tokens of a row, with the exit that it chose, if it did."""
    if row.confidence is None:
        return tokens
    layer = row.mode.layer if isinstance(row.mode, Exit) else None
    return [t._replace(exit_layer=layer, confidence=row.confidence) for t in tokens]


def _accepted(choices: Sequence[Choice], drafts: Sequence[int]) -> list[ChosenToken] | str:
    """The target's tokens up to and with the first that is not the draft at its place."""
    tokens: list[ChosenToken] = []
    for choice, draft in zip(choices, [*drafts, None], strict=True):
        if isinstance(choice, str):
            return choice
        tokens += choice
        if choice[0].token_id != draft:
            break
    return tokens
