"""Cuts texts to be scored into windows that the model can read, and puts the results together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

from multiexit_engine.errors import RequestFailed
from multiexit_engine.outputs import ScoreOutput
from multiexit_engine.request import Request, ScoredToken
from multiexit_engine.runtime.requests.core_protocol import Core
from multiexit_engine.runtime.requests.intake import Intake, Prompt
from multiexit_engine.runtime.requests.progress import run_all

ScoreItem: TypeAlias = Prompt | tuple[Prompt, Prompt]


@dataclass(frozen=True, slots=True)
class ScoredText:
    """An item as tokens.

    Attributes:
        token_ids: of which those from ``score_from`` on are scored.
        score_from: place of the first of them.
        source: what the encoder reads; empty for a decoder-only model.
    """

    token_ids: list[int]
    score_from: int
    source: tuple[int, ...] = ()


class Window(NamedTuple):
    """Tokens that the model reads at once; those from ``score_from`` on are scored."""

    token_ids: list[int]
    score_from: int


def scored_texts(items: ScoreItem | Sequence[ScoreItem], intake: Intake) -> list[ScoredText]:
    """One item or many as tokens, in their order; raises as ``scored_text``."""
    return [scored_text(item, intake, f"items[{i}]") for i, item in enumerate(_as_items(items))]


def _as_items(items: ScoreItem | Sequence[ScoreItem]) -> list[ScoreItem]:
    if isinstance(items, str | tuple):
        return [items]
    if all(isinstance(part, int) for part in items):
        return [items]  # type: ignore[list-item]
    return list(items)  # type: ignore[arg-type]


def scored_text(item: ScoreItem, intake: Intake, name: str) -> ScoredText:
    """The tokens of an item and the place where its scored part begins.

    A pair of texts is tokenised together, so that a token may not be cut where the texts meet: the
    scored part begins after as many tokens as the context alone has. For an encoder-decoder a pair
    is source and target, the scored tokens being all of the target's own.

    Raises:
        ValueError: the item is neither text, nor token ids, nor a pair of either kind.
    """
    pair = _as_pair(item, name)
    if intake.has_encoder:
        if pair is None:
            raise ValueError(f"{name}: an encoder-decoder scores (source, target) tuples")
        source = intake.checked_source(intake.token_ids(pair[0], f"{name}[0]"), f"{name}[0]")
        target = intake.token_ids(pair[1], f"{name}[1]")
        return ScoredText(intake.target(target, f"{name}[1]"), 1, tuple(source))
    if pair is None:
        return ScoredText(intake.token_ids(cast(Prompt, item), name), 0)
    context, continuation = pair
    if isinstance(context, str) and isinstance(continuation, str):
        context_ids = intake.encode(context, f"{name}[0]")
        whole = intake.token_ids(context + continuation, name)
        return ScoredText(whole, min(len(context_ids), len(whole) - 1))
    if isinstance(context, str) or isinstance(continuation, str):
        raise ValueError(f"{name}: context and continuation must both be text or both token ids")
    context_ids = intake.encode(context, f"{name}[0]")
    token_ids = context_ids + intake.token_ids(continuation, f"{name}[1]")
    return ScoredText(token_ids, len(context_ids))


def _as_pair(item: ScoreItem, name: str) -> tuple[Prompt, Prompt] | None:
    """A (context, continuation) pair; None for a single text. A tuple of integers is a text."""
    if not isinstance(item, tuple) or all(isinstance(part, int) for part in item):
        return None
    if len(item) != 2:
        raise ValueError(f"{name}: a tuple must be a (context, continuation) pair")
    return cast(tuple[Prompt, Prompt], item)


def windows(
    token_ids: Sequence[int], score_from: int, max_len: int, stride: int | None
) -> list[Window]:
    """Windows of at most ``max_len`` tokens in which each token is scored once.

    A text that fits is one window. A longer one is read in steps of ``stride`` newly scored
    tokens, each with the ``max_len - stride`` tokens before it as context; without a stride each
    window scores as much as it can and sees one token before it.

    Raises:
        ValueError: ``stride`` leaves no context, or nothing to score.
    """
    if stride is not None and not 1 <= stride < max_len:
        raise ValueError(f"stride={stride}: must be in 1..{max_len - 1}")
    step = max_len - 1 if stride is None else stride
    found: list[Window] = []
    place = max(score_from, 1)
    if len(token_ids) <= max_len:
        return [Window(list(token_ids), place)] if place < len(token_ids) else []
    while place < len(token_ids):
        # the first window scores all it can: nothing before its text is left out
        count = max_len - place if place < max_len and not found else step
        end = min(place + max(count, 1), len(token_ids))
        start = max(0, end - max_len)
        found.append(Window(list(token_ids[start:end]), place - start))
        place = end
    return found


def run_scored(
    core: Core,
    texts: Sequence[ScoredText],
    parts: Sequence[Sequence[Request]],
    progress: bool | None,
) -> list[ScoreOutput]:
    """The log-probabilities of texts, each of which is scored by one or more requests.

    Raises:
        RequestFailed: a contrast function or the model's numbers failed.
    """
    requests = [request for part in parts for request in part]
    run_all(core, requests, progress)
    for request in requests:
        core.forget(request.request_id)
    for request in requests:
        if request.error is not None:
            raise RequestFailed(request.error)
    return [
        score_output(text, [token for request in part for token in request.scored])
        for text, part in zip(texts, parts, strict=True)
    ]


def score_output(text: ScoredText, scored: Sequence[ScoredToken]) -> ScoreOutput:
    """The result of an item from the scored tokens of all its windows."""
    logprobs: list[float | None] = [token.logprob for token in scored]
    greedy = [token.is_greedy for token in scored]
    if text.score_from == 0:
        logprobs.insert(0, None)
        greedy.insert(0, False)
    return ScoreOutput(
        token_ids=text.token_ids[text.score_from :],
        token_logprobs=logprobs,
        is_greedy=greedy,
        total=sum(token.logprob for token in scored),
    )
