"""What rows whose tokens are chosen in pieces want of their heads besides a token.

Host data only. Knows nothing of memory, of pieces or of how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multiexit_engine.decoding.processors import most_edits, row_edits
from multiexit_engine.decoding.warpers import NOT_NARROWED, narrowing_row
from multiexit_engine.params import Contrast, DecodingMode
from multiexit_engine.runtime.launched.edit_memory import NO_EDITS, CountedEdits, EditRoom
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes
from multiexit_engine.runtime.rows.choosing import is_edited
from multiexit_engine.runtime.rows.flight import Place
from multiexit_engine.runtime.rows.logit_rows import LogitRow, allowed_masks, token_row
from multiexit_engine.score_edits import latest_edit


def head_wishes(rows: Sequence[LogitRow], edits: EditRoom) -> HeadWishes:
    """What rows want together; the edits of a step that they stand in have this room."""
    sampling = [row.sequence.request.sampling for row in rows]
    return HeadWishes(
        any(narrowing_row(params) != NOT_NARROWED for params in sampling),
        any(min_candidates(row.mode) != 1 for row in rows),
        any(map(lists_best, rows)),
        edits if any(map(is_edited, rows)) else NO_EDITS,
    )


def edits_of(rows: Sequence[LogitRow], places: Mapping[Place, int]) -> dict[int, CountedEdits]:
    """What is done to the scores of rows, by their places in the memory."""
    edited = [row for row in rows if is_edited(row)]
    return {
        places[row.item, row.position]: CountedEdits(
            row_edits(token_row(row)), latest_edit(row.sequence.request.sampling), mask
        )
        for row, mask in zip(edited, allowed_masks(edited), strict=True)
    }


def num_edits_at_most(rows: Sequence[LogitRow]) -> int:
    """No fewer than the edits of rows."""
    return sum(_most_edits(row) for row in rows if is_edited(row))


def _most_edits(row: LogitRow) -> int:
    request = row.sequence.request
    num_tokens = len(request.prompt_token_ids) + row.num_output_tokens
    endings = len(request.ending_token_ids)
    return most_edits(request.sampling, num_tokens, endings, request.bad_words)


def lists_best(row: LogitRow) -> bool:
    """Whether a row lists best tokens, or its token's rank."""
    return row.sequence.request.sampling.logprobs is not None


def min_candidates(mode: DecodingMode) -> int:
    """The least size of a mode's plausible sets."""
    return mode.min_candidates if isinstance(mode, Contrast) else 1
