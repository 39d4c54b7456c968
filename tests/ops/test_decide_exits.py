"""What rows measure at an exit, and who leaves: as ``EarlyExit`` decides row by row."""

import math

import pytest
import torch

from multiexit_engine.ops import compact_rows, decide_exits
from multiexit_engine.ops.exit_rows import MEASURES
from tests.ops.backends import all_backends, device_for, implementation_or_skip
from tests.ops.exit_steps import columns, moved, steps

WAYS = pytest.mark.parametrize("way", ["heads", "bounds", "told"])


def decided(asked, found, rules, progress, way, layer=4):
    """Row by row, in Python's numbers."""
    for row in asked:
        name = MEASURES[rules.measures[row]]
        if way == "told":
            value = float(found[row])
        else:
            log_prob = float(found.log_probs[row])
            value = math.exp(log_prob)
            if name == "margin":
                value -= math.exp(float(found.second_log_probs[row]))
            if name == "entropy":
                value = -log_prob if way == "bounds" else float(found.entropy[row])
        if way == "heads":
            is_same = found.tokens[row] == progress.tokens[row] and not math.isnan(log_prob)
            progress.streaks[row] = progress.streaks[row] + 1 if is_same else 1
            progress.tokens[row] = found.tokens[row]
            value = float(progress.streaks[row]) if name == "patience" else value
        progress.values[row] = value
        limit = float(rules.thresholds[row])
        if value <= limit if name == "entropy" else value >= limit:
            (progress.passed if way == "bounds" else progress.left)[row] = layer
            if way == "heads":
                progress.is_read[row] = 1


def check(function, way, device="cpu", seed=0):
    rules, progress, _, found = steps(seed, device)
    rules.measures.clamp_(min=0)
    found = found.entropy if way == "told" else found
    wanted = moved(progress, "cpu")
    marks = torch.arange(len(rules.measures)) % 4 > 0
    before = compact_rows.reference(marks).before.to(device)
    function(before, 4, found, rules, progress, way == "bounds")
    decided(marks.nonzero()[:, 0].tolist(), found, rules, wanted, way)
    actual, expected = columns(progress), columns(wanted)
    values, others = actual.pop("values"), expected.pop("values")
    assert actual == expected
    assert [value is None for value in values] == [value is None for value in others]
    pairs = zip(values, others, strict=True)
    assert all(a == pytest.approx(b, abs=1e-6) for a, b in pairs if a is not None)


@WAYS
def test_reference_decides_as_a_loop(way):
    check(decide_exits.reference, way)


@all_backends(decide_exits)
@WAYS
def test_backend_decides_as_a_loop(backend, way):
    function = implementation_or_skip(decide_exits, backend)
    check(function, way, device_for(decide_exits, backend), seed=1)
