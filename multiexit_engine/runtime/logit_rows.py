"""Rows of a step whose states become distributions, and what their requests ask of those.

Knows nothing of heads, of the cache, or of how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from multiexit_engine.decoding.processors import TokenRow
from multiexit_engine.params import DecodingMode
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.request import sequence_seed


@dataclass(frozen=True, slots=True)
class LogitRow:
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
    drafts: list[int] = field(default_factory=list)
    target: int | None = None
    confidence: float | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output before the chosen one."""
        return self.sequence.num_output_tokens + self.num_drafts


def token_row(row: LogitRow, copy: int = 0) -> TokenRow:
    """What the sampler knows of a row; ``copy`` counts the continuations of one prompt."""
    sequence = row.sequence
    request = sequence.request
    # beams take no random numbers
    index = 0 if request.is_beam_search else sequence.index + copy
    return TokenRow(
        params=request.sampling,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=[*sequence.output_token_ids, *row.drafts[: row.num_drafts]],
        seed=sequence_seed(request.seed, index),
        eos_token_ids=request.ending_token_ids,
        bad_words=request.bad_words,
        forced_token_id=request.forced_token_id(row.num_output_tokens),
    )


def allowed_masks(rows: Sequence[LogitRow]) -> list[bytes | None]:
    """Bits of the tokens that may come, for each row whose text has a grammar, else None."""
    grammars = [row.sequence.grammar for row in rows]
    return [
        None if grammar is None else grammar.allowed(row.drafts[: row.num_drafts])
        for row, grammar in zip(rows, grammars, strict=True)
    ]
