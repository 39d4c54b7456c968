import pytest

from multiexit_engine.decoding.step_times import Pace, StepTimes, Timings


def test_times_between_measured_counts_are_interpolated():
    times = Timings(Pace())
    assert times.estimate(4) is None
    times.add(2, 1.0)
    assert 0.9 < times.estimate(1) < 1.0
    assert 1.0 < times.estimate(4) < 1.1
    times.add(6, 3.0)
    assert times.estimate(4) == pytest.approx(2.0)


def test_a_count_that_was_disturbed_once_takes_no_longer_than_those_around_it():
    times = Timings(Pace())
    for _ in range(3):
        times.add(8, 1.0)
        times.add(16, 1.2)
    times.add(12, 5.0)
    assert times.estimate(12) == pytest.approx(1.1)
    times.add(12, 0.9)
    assert times.estimate(12) == pytest.approx(1.1)
    times.add(12, 1.0)
    assert times.estimate(12) == pytest.approx(1.0)


def test_one_time_that_is_far_off_changes_little():
    times = Timings(Pace())
    for seconds in (1.0, 1.1, 0.9, 50.0):
        times.add(2, seconds)
    assert times.estimate(2) == pytest.approx(1.05, abs=0.06)


def test_a_machine_that_slows_down_changes_nothing():
    times = StepTimes()
    for seconds in (1.0, 1.0, 1.0):
        times.plain.add(1, seconds)
    for _ in range(20):
        times.checks.add(3, 1.2)
    # only checks are measured from now on
    for _ in range(50):
        times.checks.add(3, 2.4)
    assert times.plain.estimate(1) == pytest.approx(1.0)
    assert times.checks.estimate(3) == pytest.approx(1.2)


def test_measurements_near_a_count_are_those_of_half_to_twice_as_many_rows():
    times = Timings(Pace())
    for count in (4, 4, 9, 30):
        times.add(count, 1.0)
    assert [times.num_measured_near(n) for n in (1, 2, 8, 9, 15, 100)] == [0, 2, 3, 1, 2, 0]


def test_the_first_time_of_anything_counts_only_where_it_is_better_than_a_guess():
    times = StepTimes()
    times.plain.add(8, 1.0)
    guessed = times.seconds(8, 1, 8, 8)
    for _ in range(2):
        times.drafts.add(8, 5.0)
        times.checks.add(16, 5.0)
        assert times.seconds(8, 1, 8, 8) == guessed
    times.drafts.add(8, 5.0)
    times.checks.add(16, 5.0)
    assert times.seconds(8, 1, 8, 8) == pytest.approx(10.0)


def test_what_was_never_measured_is_guessed_from_plain_steps():
    times = StepTimes()
    times.plain.add(8, 1.0)
    assert times.seconds(8, 0, 0, 0) == 1.0
    assert 1.4 < times.seconds(8, 1, 8, 8) < 1.7
    assert times.seconds(8, 2, 8, 16) > times.seconds(8, 1, 8, 8)
