"""Where the rows of other tokens at the places of drafts lie, and what they see."""

import torch

from multiexit_engine.batch import (
    CheckedDrafts,
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    StepOutput,
)
from multiexit_engine.params import SelfSpeculative
from multiexit_engine.request import Sequence
from multiexit_engine.runtime.rows.alternatives import (
    Alternative,
    alternatives_of,
    slots_of_accepted,
    with_alternatives,
)
from multiexit_engine.runtime.scheduling.step_plan import less_and_less
from tests.runtime.scheduler_harness import make_request

CPU = torch.device("cpu")


def drafting_step():
    """A plain sequence, and one of six tokens with two drafts and three alternatives to them."""
    plain = Sequence(make_request(), 0, [1, 2, 3], block_table=[6])
    drafted = Sequence(make_request(), 0, [*range(6)], block_table=[3, 1, 0])
    items = (
        ScheduledSequence(plain, 2, 1),
        ScheduledSequence(drafted, 5, 1, num_drafts=2, alternatives=(0, 1, 1)),
    )
    return ScheduledBatch(items)


def test_alternatives_are_rows_behind_the_sequence_whose_drafts_they_replace():
    batch, found = with_alternatives(drafting_step())
    assert found == {2: Alternative(1, 0, 1), 3: Alternative(1, 1, 1), 4: Alternative(1, 1, 2)}
    assert [(item.start, item.aside) for item in batch.scheduled[2:]] == [(6, 8), (7, 9), (7, 10)]


def test_an_alternative_sees_the_tokens_before_it_and_itself():
    batch, _ = with_alternatives(drafting_step())
    forward = ForwardBatch.build(batch, 4, CPU).by_token(batch, 4)
    assert forward.positions.tolist() == [2, 5, 6, 7, 7]
    assert forward.slot_mapping.tolist() == [26, 5, 0, 1, 2]
    tables = forward.layout.block_tables
    before = [12, 13, 14, 15, 4, 5]
    assert tables[0, :3].tolist() == [24, 25, 26]
    assert tables[2, :7].tolist() == [*before, 0]
    assert tables[3, :8].tolist() == [*before, 6, 1]
    assert tables[4, :8].tolist() == [*before, 6, 2]


def test_an_accepted_alternative_moves_to_the_place_of_its_draft():
    batch = drafting_step()
    drafted = batch.scheduled[1].sequence
    for alternative, pair in ((0, (0, 6)), (1, (1, 7)), (2, (2, 7))):
        output = StepOutput(checked=[(drafted, CheckedDrafts([], 2, 3, alternative))])
        assert slots_of_accepted(batch.scheduled, output, 4) == [pair]
    output = StepOutput(checked=[(drafted, CheckedDrafts([], 2, 3))])
    assert slots_of_accepted(batch.scheduled, output, 4) == []


def test_places_that_are_not_drafted_have_no_alternatives():
    request = make_request()
    request.decoding = SelfSpeculative(2, tree=(2, 1, 3))
    sequence = Sequence(request, 0, [1])
    assert [alternatives_of(sequence, count) for count in range(5)] == [
        (),
        (0,),
        (0,),
        (0, 2, 2),
        (0, 2, 2),
    ]


def test_where_rows_are_few_drafts_go_before_alternatives():
    request = make_request()
    request.decoding = SelfSpeculative(2, tree=(2, 2))
    sequence = Sequence(request, 0, [1])
    assert list(less_and_less(sequence, 2, 9)) == [(2, (0, 1)), (2, ()), (1, ())]
    assert list(less_and_less(sequence, 2, 3)) == [(2, ()), (1, ())]
    assert list(less_and_less(sequence, 2, 1)) == [(1, ())]
    assert list(less_and_less(sequence, 0, 9)) == []
