"""Which rows go on beyond a layer: those of a loop over their paths."""

import pytest

from multiexit_engine.ops import rows_beyond
from tests.ops.backends import all_backends, device_for, implementation_or_skip
from tests.ops.exit_steps import steps


def beyond(left, layer, paths):
    running, copied = [], []
    numbers = zip(*(each.tolist() for each in vars(paths).values()), strict=True)
    for row, (owner, joins, depth, flags) in enumerate(numbers):
        if joins <= layer < depth and (not left[owner] or flags & 1):
            (copied if flags & 2 else running).append(row)
    return running, copied


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_reference_equals_a_loop(layer):
    _, progress, paths, _ = steps()
    found = rows_beyond.reference(progress.left, layer, paths)
    assert tuple(each.index().tolist() for each in found) == beyond(progress.left, layer, paths)


@all_backends(rows_beyond)
@pytest.mark.parametrize("layer", [0, 3, 6])
def test_backend_equals_a_loop(backend, layer):
    function = implementation_or_skip(rows_beyond, backend)
    _, progress, paths, _ = steps(1, device_for(rows_beyond, backend))
    found = function(progress.left, layer, paths)
    lists = tuple(each.rows[: int(each.count)].tolist() for each in found)
    assert lists == beyond(progress.left, layer, paths)
