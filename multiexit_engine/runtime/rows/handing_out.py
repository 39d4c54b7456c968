"""What each sequence of a step gets of the tokens and scores that its rows gave.

Everything is on the host by now. Knows nothing of how a token was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

from multiexit_engine.batch import CheckedDrafts, StepOutput
from multiexit_engine.params import Exit
from multiexit_engine.request import ChosenToken, ScoredToken
from multiexit_engine.runtime.rows.alternatives import Alternative
from multiexit_engine.runtime.rows.chosen_rows import Choice
from multiexit_engine.runtime.rows.logit_rows import LogitRow

NOBODY: Mapping[int, Alternative] = MappingProxyType({})


class _Branch(NamedTuple):
    """An alternative to a draft, by the draft's number, and what its row gave."""

    number: int
    token: int
    choice: Choice


def hand_out(
    chosen: Iterable[tuple[LogitRow, Choice]],
    drafts: Mapping[int, Sequence[int]],
    output: StepOutput,
    alternatives: Mapping[int, Alternative] = NOBODY,
) -> None:
    """Give each sequence what its rows gave: of a drafted one what its drafts were right about.

    Args:
        chosen: rows and what they gave, in any order.
        drafts: of each drafted item; of an alternative the tokens up to and with it.
        output: takes tokens and failures.
        alternatives: the items that are any.
    """
    checks: dict[int, list[tuple[LogitRow, Choice]]] = {index: [] for index in drafts}
    for row, choice in chosen:
        if row.item in checks:
            checks[row.item].append((row, choice))
        elif isinstance(choice, str):
            output.failures[row.sequence.request.request_id] = choice
        else:
            output.tokens.append((row.sequence, _with_exit(row, choice)))
    branches: dict[int, list[_Branch]] = {index: [] for index in drafts}
    for item, own in alternatives.items():
        ((_, choice),) = checks.pop(item)
        branches[own.item].append(_Branch(own.number, drafts[item][-1], choice))
    for index, pairs in checks.items():
        pairs.sort(key=lambda pair: pair[0].num_drafts)
        sequence = pairs[0][0].sequence
        checked = _checked([choice for _, choice in pairs], drafts[index], branches[index])
        if isinstance(checked, str):
            output.failures[sequence.request.request_id] = checked
        else:
            output.checked.append((sequence, checked))


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


def _checked(
    choices: Sequence[Choice], drafts: Sequence[int], branches: Sequence[_Branch]
) -> CheckedDrafts | str:
    """The target's tokens up to and with the first that is not the draft at its place.

    Where that one is an alternative that was checked, the target's token after it, too. A row that
    failed behind others fails again in a step of its own: what came before is not lost with it.
    """
    tokens: list[ChosenToken] = []
    for number, (choice, draft) in enumerate(zip(choices, [*drafts, None], strict=True)):
        if isinstance(choice, str):
            if not tokens:
                return choice
            break
        tokens += choice
        token = choice[0].token_id
        if token == draft:
            continue
        for index, branch in enumerate(branches):
            if (branch.number, branch.token) != (number, token):
                continue
            if isinstance(branch.choice, str):
                break
            return CheckedDrafts([*tokens, *branch.choice], len(drafts), len(branches), index)
        break
    return CheckedDrafts(tokens, len(drafts), len(branches))
