"""Where rows wait that the host does not know of yet: what ``waits_after`` says once it does."""

import pytest
import torch

from multiexit_engine.ops import settle_paths
from tests.ops.backends import all_backends, device_for, implementation_or_skip
from tests.ops.exit_steps import NUM_ROWS, draw, steps


def settled(left, sources, joins, depths):
    for row, source in enumerate(sources):
        if source >= 0 and not left[source]:
            depths[row] = 0
        if source >= 0:
            joins[row] = max(joins[row], left[source], 1)
    return joins, depths


def case(device="cpu"):
    generator = torch.Generator().manual_seed(2)
    left = draw(0, 4, torch.int32, generator)
    sources = draw(-NUM_ROWS // 3, NUM_ROWS, torch.int32, generator).clamp(min=-1)
    _, _, paths, _ = steps(1, device)
    return left.to(device), sources.to(device), paths


@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_reference_equals_a_loop(num_rows):
    check(settle_paths.reference, "cpu", num_rows)


@all_backends(settle_paths)
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_backend_equals_a_loop(backend, num_rows):
    function = implementation_or_skip(settle_paths, backend)
    check(function, device_for(settle_paths, backend), num_rows)


def check(function, device, num_rows):
    left, sources, paths = case(device)
    own = type(paths)(*(column[:num_rows] for column in vars(paths).values()))
    numbers = [each.tolist() for each in (left, sources[:num_rows], own.joins, own.depths)]
    behind = paths.joins[num_rows:].tolist(), paths.depths[num_rows:].tolist()
    function(left, sources[:num_rows], own)
    assert (own.joins.tolist(), own.depths.tolist()) == settled(*numbers)
    assert (paths.joins[num_rows:].tolist(), paths.depths[num_rows:].tolist()) == behind
