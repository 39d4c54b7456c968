import pytest

from multiexit_engine.decoding.speculation import PROBE_INTERVAL, DraftPolicy, Timings
from multiexit_engine.request import Acceptance


def policy(plain=1.0, draft=0.2, check=1.05):
    made = DraftPolicy()
    for sequences in (1, 8):
        made.plain.add(sequences, plain)
        made.drafts.add(sequences, draft)
        for length in range(1, 17):
            made.checks.add(sequences * (1 + length), check)
    return made


def acceptance(rate, checks=50):
    made = Acceptance()
    for i in range(checks):
        made.record(1, int((i * rate) % 1 + rate >= 1))
    return made


def test_a_number_is_followed_whatever_it_costs():
    assert policy(draft=100.0).draft_len(3, acceptance(0.0), 1) == 3


def test_nothing_is_drafted_before_a_plain_step_was_timed():
    assert DraftPolicy().draft_len("auto", Acceptance(), 1) == 0


def test_better_drafts_are_longer():
    lengths = [policy().draft_len("auto", acceptance(rate), 1) for rate in (0.2, 0.6, 0.9)]
    assert lengths == sorted(lengths) and lengths[-1] > lengths[0]


def test_drafts_that_cost_more_than_they_save_are_not_made():
    assert policy(draft=0.9).draft_len("auto", acceptance(0.5), 1) == 0
    assert policy(check=3.0).draft_len("auto", acceptance(0.5), 8) == 0


def test_a_sequence_that_drafts_no_more_asks_again_at_long_intervals():
    poor = acceptance(0.0)
    assert policy(draft=0.9).draft_len("auto", poor, 1) == 0
    for _ in range(PROBE_INTERVAL):
        poor.record(0, 0)
    assert policy(draft=0.9).draft_len("auto", poor, 1) == 1
    poor.record(1, 0)
    assert policy(draft=0.9).draft_len("auto", poor, 1) == 0


def test_the_rate_follows_the_latest_checks():
    changed = acceptance(1.0)
    assert changed.rate > 0.95
    for _ in range(60):
        changed.record(2, 0)
    assert changed.rate < 0.3
    assert (changed.num_drafted, changed.num_accepted) == (170, 50)


def test_drafts_after_the_first_wrong_one_do_not_count_as_tried():
    made = Acceptance()
    for _ in range(100):
        made.record(16, 1)
    assert made.rate == pytest.approx(0.5, abs=0.03)


def test_times_between_measured_counts_are_interpolated():
    times = Timings()
    assert times.estimate(4) is None
    times.add(2, 1.0)
    assert times.estimate(1) == 1.0
    assert 1.0 < times.estimate(4) < 1.1
    times.add(6, 3.0)
    assert times.estimate(4) == pytest.approx(2.0)
    for seconds in (1.1, 0.9, 50.0):
        times.add(2, seconds)
    assert times.estimate(2) == pytest.approx(1.05)
