"""Rows of a step whose states become distributions, and what their requests ask of those.

Knows nothing of heads, of the cache, or of how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from multiexit_engine.batch import ScheduledSequence
from multiexit_engine.decoding.plan import target_mode
from multiexit_engine.decoding.processors import TokenRow, follows_tokens, looks_at_tokens
from multiexit_engine.params import DecodingMode
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.request import sequence_seed


class LogitRow(NamedTuple):
    """A row of a step whose state becomes a distribution.

    Attributes:
        item: of the step.
        position: in the sequence, of the token whose state it is.
        sequence: whose next token is chosen.
        mode: gives the distribution.
        num_drafts: drafts that are taken to follow the sequence's tokens, before the chosen one.
        drafts: the sequence's drafts, as many as are known by now.
        target: the token to be scored, where none is chosen.
        confidence: of a row that chose its mode by it, what was measured.
    """

    item: int
    position: int
    sequence: TokenSequence
    mode: DecodingMode
    num_drafts: int = 0
    drafts: Sequence[int] = ()
    target: int | None = None
    confidence: float | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output before the chosen one."""
        return self.sequence.num_output_tokens + self.num_drafts

    @property
    def needs_drafts(self) -> bool:
        """Whether its token depends on what the drafts are, not on their number alone."""
        request = self.sequence.request
        return self.num_drafts > 0 and looks_at_tokens(request.sampling, request.bad_words)

    @property
    def counts_drafts(self) -> bool:
        """Whether of the drafts that it depends on only their numbers count."""
        request = self.sequence.request
        return not follows_tokens(request.sampling, request.bad_words)

    def decided(self, mode: DecodingMode, confidence: float) -> LogitRow:
        """The row with the mode that it chose."""
        return self._replace(mode=mode, confidence=confidence)


def token_row(row: LogitRow, copy: int = 0) -> TokenRow:
    """What the sampler knows of a row; ``copy`` counts the continuations of one prompt."""
    sequence = row.sequence
    request = sequence.request
    drafts = row.drafts[: row.num_drafts]
    # beams take no random numbers
    index = 0 if request.is_beam_search else sequence.index + copy
    return TokenRow(
        params=request.sampling,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=[*sequence.output_token_ids, *drafts],
        seed=sequence_seed(request.seed, index),
        eos_token_ids=request.ending_token_ids,
        bad_words=request.bad_words,
        forced_token_id=request.forced_token_id(row.num_output_tokens),
        num_unknown=row.num_drafts - len(drafts),
        edits=sequence.edits,
    )


def allowed_masks(rows: Sequence[LogitRow]) -> list[bytes | None]:
    """Bits of the tokens that may come, for each row whose text has a grammar, else None."""
    grammars = [row.sequence.grammar for row in rows]
    return [
        None if grammar is None else grammar.allowed(row.drafts[: row.num_drafts])
        for row, grammar in zip(rows, grammars, strict=True)
    ]


def choice_rows(
    items: Iterable[tuple[int, ScheduledSequence]], drafts: Mapping[int, list[int]]
) -> list[LogitRow]:
    """The rows that choose tokens: of each item that comes to its end the last, and its drafts'.

    Args:
        items: of a step, with their places in it.
        drafts: of the items that have any; they may come to be known later.
    """
    rows = []
    for index, item in items:
        sequence = item.sequence
        if not item.reaches_end or sequence.request.score_from is not None:
            continue
        mode = target_mode(sequence.request.decoding)
        known = drafts.get(index, [])
        rows += [
            # a token that is expected counts as a draft
            LogitRow(
                index, item.stop - 1 + count, sequence, mode, sequence.num_expected + count, known
            )
            for count in range(1 + item.num_drafts)
        ]
    return rows


def target_rows(items: Iterable[tuple[int, ScheduledSequence]]) -> list[LogitRow]:
    """The rows whose next token is given and wants a score."""
    rows = []
    for index, item in items:
        request = item.sequence.request
        first = request.first_position_with_logprobs
        if first is None:
            continue
        mode = target_mode(request.decoding)
        next_wanted = first + len(request.scored)
        prompt = request.prompt_token_ids
        places = range(max(next_wanted, item.start + 1), min(item.stop + 1, len(prompt)))
        rows += [
            LogitRow(index, place - 1, item.sequence, mode, target=prompt[place])
            for place in places
        ]
    return rows


def all_rows(items: Iterable[tuple[int, ScheduledSequence]]) -> list[LogitRow]:
    """All rows, as if their scores of some token were asked for."""
    return [
        LogitRow(
            index, position, item.sequence, target_mode(item.sequence.request.decoding), target=0
        )
        for index, item in items
        for position in range(item.start, item.stop)
    ]
