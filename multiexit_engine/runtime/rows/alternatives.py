"""Other tokens for the places of drafts: each a row of the check beside the drafts of its sequence.

A row of its own behind the same tokens: it sees what its draft sees and itself, and its key and
value lie in a slot aside until it is known who was right. Knows where rows lie and which tokens
stand before them; nothing of layers, or of how a token is drafted or chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence, StepOutput, slot_of
from multiexit_engine.decoding.plan import target_mode
from multiexit_engine.params import SelfSpeculative
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.runtime.rows.logit_rows import LogitRow


class Alternative(NamedTuple):
    """A row for another token at the place of a draft.

    Attributes:
        item: of the step, whose draft it is.
        number: of the draft, from 0.
        rank: of the exit's choices there, the draft being 0.
    """

    item: int
    number: int
    rank: int


def alternatives_of(sequence: TokenSequence, num_drafts: int) -> tuple[int, ...]:
    """For each alternative that a sequence wants beside so many drafts the number of the draft."""
    mode = sequence.request.decoding
    choices = mode.choices[:num_drafts] if isinstance(mode, SelfSpeculative) else ()
    return tuple(number for number, count in enumerate(choices) for _ in range(count - 1))


def with_alternatives(batch: ScheduledBatch) -> tuple[ScheduledBatch, dict[int, Alternative]]:
    """The step with an item for each alternative, behind the one whose drafts it has.

    Returns:
        The step, and by their places in it the items that are alternatives.
    """
    if not any(item.alternatives for item in batch.scheduled):
        return batch, {}
    items: list[ScheduledSequence] = []
    found: dict[int, Alternative] = {}
    for item in batch.scheduled:
        own = len(items)
        items.append(item)
        for index, number in enumerate(item.alternatives):
            rank = 1 + item.alternatives[:index].count(number)
            found[len(items)] = Alternative(own, number, rank)
            items.append(_row_aside(item, number, index))
    return replace(batch, scheduled=tuple(items)), found


def alternative_rows(
    items: Sequence[ScheduledSequence],
    alternatives: Mapping[int, Alternative],
    drafts: Mapping[int, list[int]],
) -> list[LogitRow]:
    """The rows that choose what follows alternatives.

    Args:
        items: of the step.
        alternatives: those of them that are any.
        drafts: for each of these the tokens up to and with it; they may come to be known later.
    """
    return [
        LogitRow(
            place,
            items[place].start,
            items[place].sequence,
            target_mode(items[place].sequence.request.decoding),
            own.number + 1,
            drafts[place],
        )
        for place, own in alternatives.items()
    ]


def slots_of_accepted(
    items: Iterable[ScheduledSequence], output: StepOutput, block_size: int
) -> list[tuple[int, int]]:
    """The slots of accepted alternatives' keys and values, and those where they belong.

    Args:
        items: of the step as it was scheduled.
        output: what the step gave.
        block_size: tokens of a block.
    """
    accepted = {
        sequence: checked.alternative
        for sequence, checked in output.checked
        if checked.alternative is not None
    }
    return [
        (
            slot_of(item.sequence.block_table, _place_aside(item, index), block_size),
            slot_of(item.sequence.block_table, item.stop + item.alternatives[index], block_size),
        )
        for item in items
        if (index := accepted.get(item.sequence)) is not None
    ]


def _row_aside(item: ScheduledSequence, number: int, index: int) -> ScheduledSequence:
    aside = _place_aside(item, index)
    return ScheduledSequence(item.sequence, item.stop + number, 1, aside=aside)


def _place_aside(item: ScheduledSequence, index: int) -> int:
    return item.stop + item.num_drafts + index
