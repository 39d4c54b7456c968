import pytest

from multiexit_engine.decoding.speculation import ASK_INTERVALS, DraftPolicy, Timings
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


def steps_with_drafts(made, acceptances, num_steps):
    """The steps in which sequences draft, and how many tokens each of them."""
    found = {}
    for step in range(num_steps):
        made.begin_step()
        lengths = [made.draft_len("auto", own, len(acceptances)) for own in acceptances]
        if any(lengths):
            found[step] = lengths
    return found


def test_where_drafts_do_not_pay_all_sequences_ask_again_together():
    poor = [acceptance(0.0), acceptance(0.1), acceptance(0.2)]
    found = steps_with_drafts(policy(draft=0.9), poor, 500)
    assert list(found.values()) == [[1, 1, 1]] * len(found)


def test_the_intervals_between_questions_double_up_to_the_longest():
    shortest, longest = ASK_INTERVALS
    found = list(steps_with_drafts(policy(draft=0.9), [acceptance(0.0)], 9000))
    gaps = [later - earlier - 1 for earlier, later in zip(found, found[1:], strict=False)]
    assert found[0] == shortest
    assert gaps == [min(shortest * 2 ** (i + 1), longest) for i in range(len(gaps))]
    assert gaps[-1] == longest


def test_after_drafts_that_paid_the_intervals_are_short_again():
    made, poor = policy(draft=0.9), acceptance(0.0)
    steps_with_drafts(made, [poor], 2000)
    made.drafts = policy(draft=0.1).drafts
    assert steps_with_drafts(made, [acceptance(0.9)], 2)
    made.drafts = policy(draft=0.9).drafts
    (asked, *_) = steps_with_drafts(made, [poor], 2 * ASK_INTERVALS[0])
    assert asked <= ASK_INTERVALS[0] + 1


def test_nobody_is_asked_while_nobody_wants_drafts():
    made = policy(draft=0.9)
    steps_with_drafts(made, [], 1000)
    assert not steps_with_drafts(made, [acceptance(0.0)], ASK_INTERVALS[0])


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
