"""What rows of requests may want of their heads: every combination that steps are captured for.

Host data only. Knows nothing of memory, of pieces or of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from multiexit_engine.decoding.processors import asks_for_processing, looks_at_tokens
from multiexit_engine.ops.best_tokens import MOST_LISTED
from multiexit_engine.params import DecodingMode, SamplingParams
from multiexit_engine.runtime.launched.edit_memory import NO_EDITS, EditRoom, edit_room
from multiexit_engine.runtime.launched.plain_rows import min_candidates
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes

# tokens that end a text or are banned, of each row
_FEW_EDITS = 64


def possible_wishes(
    mode: DecodingMode, sampling: Sequence[SamplingParams], most_edits: int
) -> list[HeadWishes]:
    """What rows of one step may want together.

    Greedy rows and rows drawn by temperature, ``top_k`` and its kin are there in any case.

    Args:
        mode: of the rows.
        sampling: what some of them ask for besides.
        most_edits: of a step, as ``most_edits`` counts them.
    """
    told = {False} | {_is_told(params) for params in sampling}
    edits = {NO_EDITS}
    edited = [params for params in sampling if is_edited(params)]
    if edited:
        masked = {params.structured_outputs is not None for params in edited}
        edits |= {EditRoom(room, mask) for room in _rooms(most_edits) for mask in masked}
    has_least = min_candidates(mode) != 1
    return [
        HeadWishes(is_narrowed, has_least, is_told, room)
        for is_narrowed, is_told, room in product((False, True), sorted(told), sorted(edits))
    ]


def most_edits(sampling: Sequence[SamplingParams], max_model_len: int) -> int:
    """Edits that a row may have that asks for the most."""
    counts = [
        (max_model_len if params.bad_words or looks_at_tokens(params, ()) else 0)
        + len(params.logit_bias or ())
        for params in sampling
        if is_edited(params)
    ]
    return max(counts, default=0) + _FEW_EDITS


def is_edited(params: SamplingParams) -> bool:
    """Whether the scores of such rows are changed before a token is chosen."""
    return bool(params.bad_words) or asks_for_processing(params, 0, ())


def _is_told(params: SamplingParams) -> bool:
    return params.logprobs is not None and 0 <= params.logprobs <= MOST_LISTED


def _rooms(most: int) -> list[int]:
    room, rooms = edit_room(0), []
    while room <= edit_room(most):
        rooms.append(room)
        room *= 2
    return rooms
