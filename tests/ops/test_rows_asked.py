"""Which rows an exit is asked about: those of a loop over the rules."""

import pytest
import torch

from multiexit_engine.ops import rows_asked
from tests.ops.backends import all_backends, device_for, implementation_or_skip
from tests.ops.exit_steps import steps

KINDS = pytest.mark.parametrize(("kinds", "shortlist"), [(15, 0), (15, 50), (16, 0), (0, 0)])


def asked(here, kinds, shortlist, rules, progress, layer=4):
    found = []
    for row, code in enumerate(rules.measures.tolist()):
        own = int(rules.shortlists[row])
        is_turn = own == shortlist or (shortlist == 0 and progress.passed[row] == layer)
        is_kind = code >= 0 and kinds >> code & 1
        if here[row] and not progress.left[row] and is_kind and is_turn:
            found.append(row)
    return found


def rows_here(rules):
    return (torch.arange(len(rules.measures)) % 3 > 0).to(torch.uint8)


@KINDS
def test_reference_equals_a_loop(kinds, shortlist):
    rules, progress, *_ = steps()
    here = rows_here(rules)
    found = rows_asked.reference(here, 4, kinds, shortlist, rules, progress)
    assert found.index().tolist() == asked(here, kinds, shortlist, rules, progress)


@all_backends(rows_asked)
@KINDS
def test_backend_equals_a_loop(backend, kinds, shortlist):
    function = implementation_or_skip(rows_asked, backend)
    device = device_for(rows_asked, backend)
    rules, progress, *_ = steps(1, device)
    here = rows_here(rules).to(device)
    found = function(here, 4, kinds, shortlist, rules, progress)
    count = int(found.count)
    assert found.rows[:count].tolist() == asked(here, kinds, shortlist, rules, progress)
    assert found.before[0] == 0 and found.before[-1] == count
