"""Whether rows that go deeper run on now, or wait for others to go with them.

The layers above an exit are read for one row as for many. Weighs what fuller passes save against
the steps in which fewer rows move. Knows times and counts alone; since a row that waits is the same
when it goes on, it decides about speed only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from multiexit_engine.decoding.step_times import Pace, Timings

# a smaller gain is not worth the spread of the measurements, nor a token that comes later
LEAST_GAIN = 1.06
# steps that a row waits at most
MOST_STEPS = 6
# what a count that lies so many steps back still weighs
KEPT = 0.95


@dataclass(frozen=True, slots=True)
class Crossroads:
    """What stands at an exit in a step.

    Attributes:
        layer: of the exit.
        exits: layers at which rows of the step are measured, ascending.
        num_held: rows that want to go on and may wait.
        num_coming: rows of the next step if these wait.
        num_others: rows that go on in any case.
        weight: rows that each of the first would take through the layers above, itself included.
    """

    layer: int
    exits: tuple[int, ...]
    num_held: int
    num_coming: int
    num_others: int
    weight: float = 1.0


class _Mean:
    """Of numbers, the latest ones counting most."""

    def __init__(self) -> None:
        self._sum = self._count = 0.0

    def add(self, total: float, count: float = 1.0) -> None:
        self._sum = self._sum * KEPT + total
        self._count = self._count * KEPT + count

    @property
    def value(self) -> float:
        return self._sum / self._count


class DepthPolicy:
    """Regroups the rows of one engine by depth where the engine's own times say that it pays.

    A cycle is some steps up to an exit and one pass of the layers above for all rows that came to
    want it; what a cycle of each length gives for a second is estimated from measured times and
    shares. Rows wait as long as one step more gives more than its time gives on average.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._layers = Timings(Pace())
        self._rest = Timings(Pace())
        self._stays: dict[int, _Mean] = {}
        self._passes: dict[int, _Mean] = {}

    def note_span(self, start: int, stop: int, num_rows: int, seconds: float) -> None:
        """Rows went through the layers ``start`` to ``stop - 1``."""
        self._layers.add(num_rows, seconds / (stop - start))
        self._passes.setdefault(start, _Mean()).add(num_rows)

    def note_rest(self, num_rows: int, seconds: float) -> None:
        """What a step of so many sequences took beside its layers."""
        self._rest.add(num_rows, seconds)

    def note_exit(self, layer: int, num_measured: int, num_staying: int) -> None:
        """Of the rows that were measured at an exit some go deeper."""
        self._stays.setdefault(layer, _Mean()).add(num_staying, num_measured)

    def holds(self, place: Crossroads) -> bool:
        """Whether the rows that may wait do so."""
        if not place.num_coming or self._layers.estimate(1) is None:
            return False
        best, at_once = self._tokens_per_second(place)
        if best < LEAST_GAIN * at_once:
            return False
        coming, held = place.num_coming, place.num_held
        more = coming * self._share_beyond(place)
        later = self._above(place, held + more) - self._above(place, held)
        return coming > best * (self._below(place, coming) + later)

    def _tokens_per_second(self, place: Crossroads) -> tuple[float, float]:
        """Of the best cycle, and of going on in every step."""
        everyone = float(place.num_held + place.num_coming)
        beyond = self._share_beyond(place)
        rows, tokens, seconds = everyone, 0.0, 0.0
        rates = []
        for _ in range(MOST_STEPS):
            seconds += self._below(place, rows)
            tokens += rows * (1 - beyond)
            rows *= 1 - beyond
            held = everyone - rows
            rates.append((tokens + held) / (seconds + self._above(place, held)))
        return max(rates), rates[0]

    def _share_beyond(self, place: Crossroads) -> float:
        """Of the rows of a step those that want to go beyond the exit."""
        share = 1.0
        for layer in place.exits:
            if layer <= place.layer:
                share *= self._share(layer)
        return share

    def _below(self, place: Crossroads, num_rows: float) -> float:
        """Seconds of a step in which so many rows come, up to the exit, and no other does more."""
        first, *_ = place.exits
        seconds = self._seconds(first, num_rows + place.num_others) + self._rest_of(num_rows)
        for start, stop in pairwise(place.exits):
            num_rows *= self._share(start)
            if stop <= place.layer:
                seconds += num_rows * self._seconds_of_row(start, stop, num_rows)
        if place.num_others:
            seconds += self._seconds(self._num_layers - place.layer, place.num_others)
        return seconds

    def _above(self, place: Crossroads, num_rows: float) -> float:
        """Seconds of a pass of so many rows above the exit, beside others that are there."""
        if not num_rows:
            return 0.0
        stops = [*(layer for layer in place.exits if layer > place.layer), self._num_layers]
        num_rows *= place.weight
        width = stops[0] - place.layer
        seconds = self._seconds(width, num_rows + place.num_others)
        if place.num_others:
            seconds -= self._seconds(width, place.num_others)
        for start, stop in pairwise(stops):
            num_rows *= self._share(start)
            seconds += num_rows * self._seconds_of_row(start, stop, num_rows)
        return seconds

    def _share(self, layer: int) -> float:
        """Of the rows measured at an exit those that stay."""
        return self._stays[layer].value if layer in self._stays else 1.0

    def _seconds_of_row(self, start: int, stop: int, num_rows: float) -> float:
        """For each row of a span, in passes as large as they usually are."""
        usual = self._passes[start].value if start in self._passes else num_rows
        return self._seconds(stop - start, usual) / max(1.0, usual)

    def _seconds(self, num_layers: int, num_rows: float) -> float:
        found = self._layers.estimate(max(1, round(num_rows)))
        assert found is not None, "layers were measured"
        return num_layers * found

    def _rest_of(self, num_rows: float) -> float:
        return self._rest.estimate(max(1, round(num_rows))) or 0.0
