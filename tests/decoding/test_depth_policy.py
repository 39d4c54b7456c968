"""Rows wait for each other where fuller passes of the layers above an exit pay, nowhere else."""

import pytest

from multiexit_engine.decoding.depth_policy import Crossroads, DepthPolicy

ROWS = (1, 4, 16, 64)


def policy_of(seconds_of_layer, share=0.4, rest=0.001):
    """A policy that has measured layers, an exit at 6 of 24 and what a step takes beside."""
    policy = DepthPolicy(24)
    for _ in range(20):
        for rows in ROWS:
            policy.note_span(0, 6, rows, 6 * seconds_of_layer(rows))
            policy.note_rest(rows, rest)
        policy.note_exit(6, 1000, int(1000 * share))
    return policy


def place(held, coming, others=0, weight=1.0):
    return Crossroads(6, (6,), held, coming, others, weight)


def flat(rows):
    return 1.0


def linear(rows):
    return float(rows)


@pytest.mark.parametrize(("held", "coming", "waits"), [(6, 10, True), (13, 3, False)])
def test_rows_wait_where_layers_cost_the_same_for_any_number(held, coming, waits):
    assert policy_of(flat).holds(place(held, coming)) is waits


def test_rows_never_wait_where_layers_cost_by_the_row():
    policy = policy_of(linear)
    assert not any(policy.holds(place(held, 16 - held)) for held in range(1, 17))


def test_nobody_waits_alone():
    assert not policy_of(flat).holds(place(4, 0))


def test_rows_go_with_others_that_read_the_layers_anyway():
    assert not policy_of(flat).holds(place(6, 10, others=1))


def test_rows_go_on_before_anything_was_measured():
    assert not DepthPolicy(24).holds(place(6, 10))


def test_rows_that_seldom_leave_do_not_wait():
    assert not policy_of(flat, share=0.95).holds(place(15, 1))


def test_the_fewer_rows_stay_the_longer_they_wait():
    few, many = policy_of(flat, share=0.1), policy_of(flat, share=0.6)
    longest = [max(h for h in range(1, 16) if p.holds(place(h, 16 - h))) for p in (few, many)]
    assert longest == sorted(longest)
    assert few.holds(place(2, 14))
