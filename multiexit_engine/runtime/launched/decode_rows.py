"""What the decode memory has to know of the rows of a step: tokens, places and wishes.

Knows requests and their sequences; nothing of tensors, of layers or of how rows lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence
from multiexit_engine.decoding.plan import ExitPlan, target_mode
from multiexit_engine.decoding.warpers import NOT_NARROWED, narrowing_row
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.request import sequence_seed
from multiexit_engine.runtime.launched.decode_memory import DecodeRow
from multiexit_engine.runtime.launched.launched_step import LaunchedStep
from multiexit_engine.runtime.launched.plain_rows import min_candidates
from multiexit_engine.runtime.rows.flight import Place
from multiexit_engine.runtime.rows.logit_rows import LogitRow


def alphas_of(plan: ExitPlan, plain: Sequence[LogitRow]) -> dict[int, float]:
    """The alpha of each item with a contrast."""
    return {
        plain[row].item: alpha
        for group in plan.groups
        if group.alphas
        for row, alpha in zip(group.rows, group.alphas, strict=True)
    }


def decode_rows(
    batch: ScheduledBatch,
    places: Mapping[Place, int],
    alphas: Mapping[int, float],
    before: LaunchedStep | None,
) -> dict[int, DecodeRow]:
    """What the step has to know of each row of the memory that is no padding."""
    found = {}
    for (index, position), row in places.items():
        item = batch.scheduled[index]
        number = position - (item.stop - 1)
        chosen_by = places[index, position - 1] if number else None
        found[row] = _decode_row(item, number, chosen_by, alphas.get(index, 1.0), before)
    return found


def waiting_row(sequence: TokenSequence, position: int) -> DecodeRow:
    """A row whose token was chosen before, and which only runs layers that it lacks."""
    sources = sequence.source_table, len(sequence.request.source_token_ids)
    what = 0, 0, 0.0, 1.0, NOT_NARROWED, 1, -1
    return DecodeRow(0, -1, position, sequence.block_table, *what, *sources)


def _decode_row(
    item: ScheduledSequence,
    number: int,
    chosen_by: int | None,
    alpha: float,
    before: LaunchedStep | None,
) -> DecodeRow:
    """One row.

    Args:
        item: whose row.
        number: of its round.
        chosen_by: the row whose draft it is, if it is one.
        alpha: of its contrast.
        before: the step that is choosing the item's token, if it is not known.
    """
    sequence, request = item.sequence, item.sequence.request
    is_known = chosen_by is None and item.stop <= len(sequence.token_ids)
    if chosen_by is None and not is_known:
        assert before is not None, "nobody chooses this token"
        chosen_by = before.coming.token_rows[sequence]
    return DecodeRow(
        token=sequence.token_ids[item.stop - 1] if is_known else 0,
        chosen_by=-1 if chosen_by is None else chosen_by,
        position=item.stop - 1 + number,
        block_table=sequence.block_table,
        seed=sequence_seed(request.seed, sequence.index),
        num_output_tokens=item.stop + number - len(request.prompt_token_ids),
        temperature=request.sampling.temperature,
        alpha=alpha,
        narrowing=narrowing_row(request.sampling),
        min_candidates=min_candidates(target_mode(request.decoding)),
        logprobs=-1 if request.sampling.logprobs is None else request.sampling.logprobs,
        source_table=sequence.source_table,
        source_len=len(request.source_token_ids),
    )
