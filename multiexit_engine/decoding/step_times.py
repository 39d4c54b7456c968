"""What plain steps, drafts and checks take, by their rows, told from a machine's own ups and downs.

Knows nothing of tokens or acceptances, nor of how a length is chosen.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from statistics import median

# what each row more costs where nothing near was measured, as a share of the step
ROW_COST = 0.02
# what an unmeasured draft costs, as a share of the step
DRAFT_COST = 0.4
KEPT_TIMES = 9
# measurements after which a number of rows is known by itself
KNOWN_TIMES = 3


class Pace:
    """How much slower the machine is now than when it was first measured.

    Where a neighbour takes half of its memory bandwidth, all kinds of steps slow down together,
    but only one kind is measured at a time: the others would look as fast as they once were.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=KEPT_TIMES)
        self.value = 1.0

    def note(self, ratio: float) -> None:
        """Something took this many times its usual seconds."""
        self._ratios.append(ratio)
        self.value = median(self._ratios)


class Timings:
    """Median seconds of something by the number of its rows, at the machine's first pace."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._times: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._seen: list[int] = []
        self._known: list[int] = []

    def add(self, num_rows: int, seconds: float) -> None:
        """Count one more measurement."""
        if num_rows in self._times:
            self._pace.note(seconds / self._medians[num_rows])
        else:
            self._times[num_rows] = deque(maxlen=KEPT_TIMES)
            insort(self._seen, num_rows)
        times = self._times[num_rows]
        times.append(seconds / self._pace.value)
        self._medians[num_rows] = median(times)
        if len(times) == KNOWN_TIMES and num_rows not in self._known:
            insort(self._known, num_rows)

    def num_measured_near(self, num_rows: int) -> int:
        """Remembered measurements of half to twice as many rows."""
        near = (n for n in self._seen if n <= 2 * num_rows and num_rows <= 2 * n)
        return sum(len(self._times[n]) for n in near)

    def estimate(self, num_rows: int, guess: float | None = None) -> float | None:
        """Seconds for this many rows, by the measured counts next to it.

        A count that was measured once or twice takes no longer than better known ones around it
        say, or the guess where there are none: whatever disturbs a measurement makes it longer,
        and the first one of anything always is.

        Args:
            num_rows: how many.
            guess: taken where nothing is known; without it the nearest measurements are, if any.
        """
        own = self._medians.get(num_rows)
        if len(self._times.get(num_rows, ())) >= KNOWN_TIMES:
            return own
        around = self._interpolated(num_rows, self._known)
        if around is None:
            around = self._interpolated(num_rows, self._seen) if guess is None else guess
        return around if own is None or around is None else min(own, around)

    def _interpolated(self, num_rows: int, counts: list[int]) -> float | None:
        if not counts:
            return None
        place = bisect_left(counts, num_rows)
        if place in (0, len(counts)):
            nearest = counts[min(place, len(counts) - 1)]
            return self._medians[nearest] * _row_factor(num_rows - nearest)
        low, high = counts[place - 1 : place + 1]
        below, above = self._medians[low], self._medians[high]
        return below + (above - below) * (num_rows - low) / (high - low)


def _row_factor(num_more: int) -> float:
    """What so many rows more, or fewer, make of a time."""
    factor = 1 + ROW_COST * abs(num_more)
    return factor if num_more >= 0 else 1 / factor


class StepTimes:
    """Times of the steps of one mix of modes.

    Attributes:
        plain: steps in which nothing was drafted, by their sequences.
        drafts: one draft of each of so many sequences.
        checks: what steps with drafts took beside the drafts, by sequences and drafts together.
    """

    def __init__(self) -> None:
        pace = Pace()
        self.plain = Timings(pace)
        self.drafts = Timings(pace)
        self.checks = Timings(pace)

    def seconds(self, num_sequences: int, rounds: int, num_drafting: int, num_drafts: int) -> float:
        """What a step takes; ``plain`` has been measured.

        Args:
            num_sequences: of the step, those without drafts included.
            rounds: the most drafts of any of them.
            num_drafting: sequences with drafts.
            num_drafts: all drafts of all of them.
        """
        plain = self.plain.estimate(num_sequences)
        assert plain is not None, "plain steps are measured first"
        if not rounds:
            return plain
        draft = self.drafts.estimate(num_drafting, DRAFT_COST * plain)
        check = self.checks.estimate(num_sequences + num_drafts, plain * _row_factor(num_drafts))
        assert draft is not None and check is not None, "there are guesses"
        return rounds * draft + check

    def row_seconds(self, num_sequences: int) -> float:
        """What one more row costs a check of so many sequences with about one draft each."""
        fewer = self.seconds(num_sequences, 1, num_sequences, num_sequences // 2)
        more = self.seconds(num_sequences, 1, num_sequences, num_sequences // 2 + num_sequences)
        return max(0.0, more - fewer) / num_sequences
