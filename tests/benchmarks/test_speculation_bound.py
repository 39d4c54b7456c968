"""The bound of self-speculation in cases that can be worked out by hand."""

import pytest
import speculation_bound
from speculation_bound import Peaks, SpeculationBound, rate_of


def bound(bytes_per_s=4.0, flops_per_s=1e9):
    peaks = Peaks(bytes_per_s, flops_per_s)
    return SpeculationBound(
        layer=3, head=4, draft_head=1, num_layers=4, draft_exit=1, weight_bytes=4, peaks=peaks
    )


def test_drafts_and_checks_cost_the_bytes_that_they_read():
    # plain 16 weights; a draft 3 + 1, a check all 16 again
    assert bound().gain(0.5, batch=1, length=1) == pytest.approx(1.5 * 16 / (4 + 16))


def test_where_arithmetic_is_all_that_counts_nothing_is_gained():
    assert bound(1e9, 1.0).gain(0.9, batch=8, length=3) < 1
    assert bound(1e9, 1.0).gain(0.9, batch=8, length=None) == 1.0


def test_the_best_length_is_taken_where_none_is_given():
    gains = [bound().gain(0.8, 1, length) for length in range(1, speculation_bound.LONGEST + 1)]
    assert bound().gain(0.8, 1, None) == max(gains) > 1


@pytest.mark.parametrize("length", [1, 3])
def test_the_rate_is_found_from_the_share_of_accepted_drafts(length):
    share = sum(0.7**k for k in range(1, length + 1)) / length
    assert rate_of(share, length) == pytest.approx(0.7)
