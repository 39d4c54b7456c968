"""How rounds of drafts lie in the memory: as few numbers of rows as can be captured."""

from __future__ import annotations

import sys

import pytest

from multiexit_engine import Original, SamplingParams
from multiexit_engine.batch import ScheduledSequence
from multiexit_engine.request import Request, Sequence
from multiexit_engine.runtime.device.graphs import Graphs, graph_sizes
from multiexit_engine.runtime.drafts.draft_rounds import Rounds

GRAPHS = Graphs(graph_sizes(64), 1024, capture=lambda call: call)
ROWS = 4 * 64 + 64


def rounds_of(*num_drafts):
    request = Request("0", [1], SamplingParams(), Original(), 4, 0)
    items = [ScheduledSequence(Sequence(request, 0, [1]), 0, 1, count) for count in num_drafts]
    return Rounds.of(list(enumerate(items)), GRAPHS.size, ROWS)


def test_rounds_of_fewer_sequences_take_as_many_rows():
    rounds = rounds_of(1, 3, 0)
    assert rounds.sizes == (4, 4, 4, 4)
    assert rounds.num_rows == 16
    assert rounds.batch_size == 4
    assert rounds.places == {
        (1, 0): 0, (0, 0): 1, (2, 0): 2, (1, 1): 4, (0, 1): 5, (1, 2): 8, (1, 3): 12
    }  # fmt: skip


def test_rounds_differ_and_are_not_captured_where_there_is_no_room():
    rounds = rounds_of(*[6] * 2, *[0] * 60)
    assert rounds.sizes == (64, *[2] * 6)
    assert rounds.num_rows == 64 + 12
    assert rounds.batch_size == sys.maxsize > GRAPHS.sizes[-1]


@pytest.mark.parametrize(("most", "counts"), [(3, (132, 60, 33)), (16, (396, 111, 121))])
def test_captures_of_drafts_are_counted_in_the_docs(most, counts):
    """Rounds below the exit, the check above it, drafts, for three bounds of keys."""
    below, checks, drafts = set(), set(), set()
    for size in GRAPHS.sizes:
        for number in range(2, most + 2):
            rows = GRAPHS.size(size * number)
            if rows > ROWS:
                break
            checks.add(rows)
            below |= {(place * size, size) for place in range(number)}
            drafts |= {(place * size, size) for place in range(number - 1)}
    assert (3 * len(below), 3 * len(checks), len(drafts)) == counts
