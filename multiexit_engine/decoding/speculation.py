"""How many tokens to draft before a check: as many as pay, none where none does.

Weighs a sequence's measured acceptance against the measured time of drafts, checks and plain
steps. Knows nothing of models; since drafts never change tokens, it decides about speed alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from statistics import median
from typing import Literal

from multiexit_engine.modes import MAX_DRAFT_LEN
from multiexit_engine.request import Acceptance

# a smaller gain is not worth the spread of the measurements
LEAST_GAIN = 1.03
# where drafts do not pay, all sequences draft one token in the same step after so many steps, to
# see whether they do now: together, since one draft costs about as much as many. The interval
# doubles while the answer is no
ASK_INTERVALS = (64, 1024)
# what an unmeasured check costs for each row more, as a share of the step
ROW_COST = 0.02
# what an unmeasured draft costs, as a share of the step
DRAFT_COST = 0.4
KEPT_TIMES = 9


class Timings:
    """Median seconds of something by the number of its rows."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._counts: list[int] = []

    def add(self, num_rows: int, seconds: float) -> None:
        """Count one more measurement."""
        if num_rows not in self._times:
            self._times[num_rows] = deque(maxlen=KEPT_TIMES)
            insort(self._counts, num_rows)
        self._times[num_rows].append(seconds)
        self._medians[num_rows] = median(self._times[num_rows])

    def estimate(self, num_rows: int) -> float | None:
        """Seconds for this many rows, from the measured counts next to it; None before any."""
        if num_rows in self._medians:
            return self._medians[num_rows]
        if not self._counts:
            return None
        place = bisect_left(self._counts, num_rows)
        if place == 0:
            return self._medians[self._counts[0]]
        low = self._counts[place - 1]
        below = self._medians[low]
        if place == len(self._counts):
            return below * (1 + ROW_COST * (num_rows - low))
        high = self._counts[place]
        above = self._medians[high]
        return below + (above - below) * (num_rows - low) / (high - low)


class DraftPolicy:
    """Draft lengths of one engine.

    Attributes:
        plain: steps in which nothing was drafted, by their sequences.
        drafts: one draft of each of so many sequences.
        checks: what steps with drafts took beside the drafts, by sequences and drafts together.
    """

    def __init__(self) -> None:
        self.plain = Timings()
        self.drafts = Timings()
        self.checks = Timings()
        self._interval, self._longest_interval = ASK_INTERVALS
        self._num_plain = 0
        self._is_asking = False
        self._is_refusing = False
        self._is_drafting = False

    def begin_step(self) -> None:
        """The lengths asked for from now on are those of one more step."""
        if self._is_drafting:
            self._interval = ASK_INTERVALS[0]
        elif self._is_asking and self._is_refusing:
            self._interval = min(2 * self._interval, self._longest_interval)
        self._num_plain = 0 if self._is_asking else self._num_plain + self._is_refusing
        self._is_asking = self._num_plain >= self._interval
        self._is_drafting = self._is_refusing = False

    def draft_len(
        self, wanted: int | Literal["auto"], acceptance: Acceptance, num_sequences: int
    ) -> int:
        """Tokens to draft for one of ``num_sequences`` sequences of the next step.

        A number is followed as it is. "auto" takes the length with the most tokens per second,
        where it beats plain decoding; where none does, one draft at growing intervals asks again.
        """
        if wanted != "auto":
            return wanted
        plain = self.plain.estimate(num_sequences)
        if plain is None:
            return 0
        best, gain, last = 0, LEAST_GAIN, 0.0
        rate, tokens = acceptance.rate, 1.0
        for length in range(1, MAX_DRAFT_LEN + 1):
            tokens += rate**length  # Leviathan et al. 2022, arXiv:2211.17192, eq. 1
            found = tokens * plain / self._seconds(length, num_sequences, plain)
            if found > gain:
                best, gain = length, found
            if found < last:
                break  # longer ones gain less and less
            last = found
        if best:
            self._is_drafting = True
            return best
        self._is_refusing = True
        return int(self._is_asking)

    def _seconds(self, length: int, num_sequences: int, plain: float) -> float:
        draft = self.drafts.estimate(num_sequences)
        num_rows = num_sequences * (1 + length)
        check = self.checks.estimate(num_rows)
        if draft is None:
            draft = DRAFT_COST * plain
        if check is None:
            check = plain * (1 + ROW_COST * (num_rows - num_sequences))
        return length * draft + check
