"""How many tokens to draft before a check: as many as pay, none where none does.

Weighs the measured acceptances of all sequences of a step against the measured time of drafts,
checks and plain steps. Knows nothing of models; since drafts never change tokens, it decides about
speed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal, NamedTuple

from multiexit_engine.decoding.step_times import KNOWN_TIMES, StepTimes
from multiexit_engine.modes import MAX_DRAFT_LEN
from multiexit_engine.request import Acceptance

# a smaller gain is not worth the spread of the measurements
LEAST_GAIN = 1.03
# plain steps that are measured before anything is drafted
FIRST_STEPS = 3
# Where drafts do not pay, all sequences draft in the same step after so many plain steps, to see
# whether they do now: together, since one draft costs about as much as many. Where they pay, one
# plain step after so many with drafts tells what there is to beat. Both intervals double while the
# answer stays the same.
ASK_INTERVALS = (16, 1024)
COMPARE_INTERVALS = (16, 256)
# Where so many standard errors more of acceptance would make drafts pay, bad luck may have decided:
# the interval between questions does not grow then.
HOPE, HOPE_INTERVAL = 1.0, 12
# of the time, what questions may cost at most
ASK_SHARE = 0.01
# drafts of a step before their times are known, and of a question
FIRST_DRAFTS = 2
# of what all sequences together learn about acceptance, see ``Acceptance``
OVERALL_HALF_LIFE, OVERALL_PRIOR_WEIGHT = 512.0, 12.0


class Wish(NamedTuple):
    """What one sequence would like to draft.

    Attributes:
        draft_len: a number, or "auto".
        most: drafts that it could use, 0 or more.
        acceptance: what became of its drafts so far.
    """

    draft_len: int | Literal["auto"]
    most: int
    acceptance: Acceptance


class _Turns:
    """Whose turn it is: plain steps, drafts, or a look at what the other one would give.

    Attributes:
        is_drafting: whether drafts paid when that was last weighed.
        has_asked: whether the last step drafted to see whether drafts pay now.
    """

    def __init__(self) -> None:
        self.is_drafting = False
        self.has_asked = True
        self._steps_left = 0
        self._interval = ASK_INTERVALS[0]

    def goes_on(self) -> bool:
        """Whether it is too early for a look at the other side; counts a step if so."""
        if not self._steps_left:
            return False
        self._steps_left -= 1
        return True

    def wait(self) -> None:
        """The answer is the old one: look again, later than the last time."""
        self._steps_left = self._interval
        longest = COMPARE_INTERVALS[1] if self.is_drafting else ASK_INTERVALS[1]
        self._interval = min(2 * self._interval, longest)

    def draft(self) -> None:
        """Drafts pay."""
        self.has_asked = False
        if not self.is_drafting:
            self.is_drafting, self._interval = True, COMPARE_INTERVALS[0]
            self.wait()

    def rest(self, price: float, *, is_hopeful: bool) -> None:
        """Drafts do not pay.

        Args:
            price: of a question, in plain steps; less than 0 where it gains something.
            is_hopeful: whether drafts would pay with a little luck.
        """
        self.has_asked = False
        if self.is_drafting or is_hopeful:
            self.is_drafting, self._interval = False, ASK_INTERVALS[0]
        if is_hopeful:
            self._steps_left = HOPE_INTERVAL
        else:
            self.wait()
        self._steps_left = max(self._steps_left, int(price / ASK_SHARE))


class DraftPolicy:
    """Draft lengths for the steps of one mix of modes.

    Attributes:
        times: what steps and drafts take.
        acceptance: of all sequences together; what a new sequence is taken for.
    """

    def __init__(self) -> None:
        self.times = StepTimes()
        self.acceptance = Acceptance(OVERALL_HALF_LIFE, OVERALL_PRIOR_WEIGHT)
        # that drafts do not pay for many sequences says nothing of few: by the binary digits of
        # their number
        self._turns: dict[int, _Turns] = {}

    def rests(self, num_sequences: int) -> bool:
        """Whether this is one of the plain steps between two questions; counts it if so."""
        turns = self._turns.get(num_sequences.bit_length())
        return turns is not None and not turns.is_drafting and turns.goes_on()

    def lengths(self, wishes: Sequence[Wish], num_sequences: int) -> list[int]:
        """Tokens to draft for some of the ``num_sequences`` sequences of the next step.

        Numbers are followed as they are. For those with "auto" one number of rounds is chosen: a
        round of drafts, and the check, cost about the same for few sequences as for all, so it is
        the step's tokens per second that count. A sequence whose drafts are seldom accepted leaves
        the rounds early. Where plain decoding is faster nobody drafts.
        """
        fixed = [0 if wish.draft_len == "auto" else wish.draft_len for wish in wishes]
        lengths = fixed if all(fixed) else self._chosen(wishes, fixed, num_sequences)
        # only now: that a request ends soon says nothing of what drafts are worth
        return [min(wish.most, length) for wish, length in zip(wishes, lengths, strict=True)]

    def _chosen(self, wishes: Sequence[Wish], fixed: list[int], num_sequences: int) -> list[int]:
        if self.rests(num_sequences):
            return fixed
        if self.times.plain.num_measured_near(num_sequences) < FIRST_STEPS:
            return fixed
        turns = self._turns.setdefault(num_sequences.bit_length(), _Turns())
        if turns.is_drafting:
            if not turns.goes_on():
                turns.wait()
                return fixed
        elif not turns.has_asked:
            turns.has_asked = True
            hoped = self._hoped(wishes, fixed, num_sequences)
            return hoped if hoped != fixed else [own or 1 for own in fixed]
        rates = self._rates(wishes)
        best = self._best(wishes, fixed, rates, num_sequences)
        if best != fixed:
            turns.draft()
            return best
        hoped = self._hoped(wishes, fixed, num_sequences)
        question = hoped if hoped != fixed else [own or 1 for own in fixed]
        price = self._price(question, fixed, rates, num_sequences)
        turns.rest(price, is_hopeful=hoped != fixed)
        return fixed

    def _rates(self, wishes: Sequence[Wish], luck: float = 0.0) -> list[float]:
        """Estimated acceptances, and so many standard errors of what is known of all more."""
        prior = self.acceptance.rate
        rates = [wish.acceptance.rate_after(prior) for wish in wishes]
        own = sum(wish.acceptance.weight for wish in wishes)
        mean = sum(rates) / len(rates)
        error = sqrt(mean * (1 - mean) / min(own, self.acceptance.weight))
        return [min(1.0, rate + luck * error) for rate in rates]

    def _hoped(self, wishes: Sequence[Wish], fixed: list[int], num_sequences: int) -> list[int]:
        """What would be best with a little luck."""
        rates = self._rates(wishes, HOPE)
        return self._best(wishes, fixed, rates, num_sequences, FIRST_DRAFTS)

    def _price(
        self,
        question: Sequence[int],
        fixed: Sequence[int],
        rates: Sequence[float],
        num_sequences: int,
    ) -> float:
        """What a step with a question loses, in steps without one."""
        both = question, fixed
        asked, plain = (self._tokens(lengths, rates, num_sequences) for lengths in both)
        slower, faster = (self._speed(lengths, rates, num_sequences) for lengths in both)
        return asked / plain * (faster / slower - 1)

    def _best(
        self,
        wishes: Sequence[Wish],
        fixed: list[int],
        rates: Sequence[float],
        num_sequences: int,
        longest: int = MAX_DRAFT_LEN,
    ) -> list[int]:
        """The lengths with the most tokens per second; ``fixed`` where drafts do not pay."""
        caps = self._caps(rates, num_sequences)
        if self.times.drafts.num_measured_near(num_sequences) < KNOWN_TIMES:
            longest = min(longest, FIRST_DRAFTS)
        best, least = fixed, LEAST_GAIN * self._speed(fixed, rates, num_sequences)
        last = 0.0
        for rounds in range(1, longest + 1):
            lengths = [
                min(rounds, cap) if wish.draft_len == "auto" else own
                for wish, cap, own in zip(wishes, caps, fixed, strict=True)
            ]
            speed = self._speed(lengths, rates, num_sequences)
            if speed > least:
                best, least = lengths, speed
            if speed < last or rounds >= max(caps):
                break  # longer ones gain less and less
            last = speed
        return best

    def _caps(self, rates: Sequence[float], num_sequences: int) -> list[int]:
        """Drafts of each sequence that are worth the row that they add to a check."""
        plain = self.times.seconds(num_sequences, 0, 0, 0)
        worth = self.times.row_seconds(num_sequences) * num_sequences / plain
        caps = []
        for rate in rates:
            cap, chance = 0, rate
            while cap < MAX_DRAFT_LEN and chance >= worth:
                cap, chance = cap + 1, chance * rate
            caps.append(cap)
        return caps

    def _speed(self, lengths: Sequence[int], rates: Sequence[float], num_sequences: int) -> float:
        """Expected tokens per second of a step."""
        tokens = self._tokens(lengths, rates, num_sequences)
        num_drafting = sum(length > 0 for length in lengths)
        rounds = max(lengths, default=0)
        return tokens / self.times.seconds(num_sequences, rounds, num_drafting, sum(lengths))

    def _tokens(self, lengths: Sequence[int], rates: Sequence[float], num_sequences: int) -> float:
        """Expected tokens of a step.

        Source: Leviathan et al. 2022, arXiv:2211.17192, eq. 1, summed over sequences.
        """
        tokens = float(num_sequences)
        for length, rate in zip(lengths, rates, strict=True):
            chance = 1.0
            for _ in range(length):
                chance *= rate
                tokens += chance
        return tokens
