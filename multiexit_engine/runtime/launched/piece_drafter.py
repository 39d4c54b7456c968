"""Rounds of drafts and their check as pieces: all of a step's drafts without a wait.

An exit drafts round by round, each from the tokens that the round before left on the device; then
all rounds go on together through the layers above. Knows nothing of how drafts are accepted, nor
of how many pay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence
from multiexit_engine.config import ModelConfig
from multiexit_engine.decoding.plan import Segment
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.params import Exit, SelfSpeculative
from multiexit_engine.runtime.drafts.draft_rounds import NumKeys, Rounds
from multiexit_engine.runtime.drafts.drafting import draft_vocab
from multiexit_engine.runtime.launched.decode_memory import DecodeMemory
from multiexit_engine.runtime.launched.decode_pieces import DecodePieces
from multiexit_engine.runtime.launched.state_rows import StateRows
from multiexit_engine.runtime.rows.choosing import TokenChooser
from multiexit_engine.runtime.rows.flight import Place
from multiexit_engine.runtime.rows.logit_rows import LogitRow


class PieceDrafter:
    """Drafts with the exits of one model, in the memory of its decode steps."""

    def __init__(
        self,
        config: ModelConfig,
        memory: DecodeMemory,
        pieces: DecodePieces,
        chooser: TokenChooser,
    ) -> None:
        self._config = config
        self._memory = memory
        self._pieces = pieces
        self._chooser = chooser

    def fits(
        self,
        batch: ScheduledBatch,
        rows: Sequence[LogitRow],
        rounds: Rounds,
        num_ends: int,
        has_stream: bool,
    ) -> bool:
        """Whether nobody looks at the drafts of a step before its end, and one exit makes them all.

        Args:
            batch: the step.
            rows: those that choose tokens.
            rounds: its rows that get one token each.
            num_ends: rows behind all others.
            has_stream: each row goes as far as it may, since some choose their exits. Otherwise
                rows of other depths would stand between those that are checked.
        """
        modes = [_drafting(item) for item in batch.scheduled if item.num_drafts]
        depths = {item.sequence.request.depth for _, item in rounds.items}
        return (
            len({(mode.draft_exit, mode.draft_vocab) for mode in modes}) == 1
            and (has_stream or len(depths) == 1)
            and not any(row.needs_drafts for row in rows)
            and not any(item.alternatives for item in batch.scheduled)
            and rounds.num_rows + num_ends <= self._memory.spare_row
        )

    def run(
        self,
        rounds: Rounds,
        layers: Collection[int],
        places: Mapping[Place, int],
        have_drafted: Callable[[], None],
    ) -> None:
        """Run all layers of a step's rounds.

        Args:
            rounds: at least two.
            layers: whose outputs are kept.
            places: the rows of positions.
            have_drafted: is called when all drafts were launched.
        """
        self.draft(rounds, layers, places, 0)
        have_drafted()
        _, first_item = rounds.items[0]
        mode, depth = _drafting(first_item), first_item.sequence.request.depth
        self._check(mode, depth, rounds, rounds.num_keys, layers)

    def draft(
        self, rounds: Rounds, layers: Collection[int], places: Mapping[Place, int], first: int
    ) -> None:
        """Run a step's rounds up to the exit that drafts.

        Args:
            rounds: at least two.
            layers: whose outputs are kept.
            places: the rows of positions.
            first: of the rounds to run; those before it have come to the exit.
        """
        mode = _drafting(rounds.items[0][1])
        choose = partial(self._draft, mode, rounds, places)
        self._run_below(mode, rounds, rounds.num_keys, layers, first, choose)

    def even_rounds(self, num_rows: int, count: int) -> Rounds:
        """So many rounds, of so many rows each, of nobody."""
        sizes = (num_rows,) * count
        return Rounds((), sizes, sizes, self._pieces.size(num_rows * count))

    def warm_up(
        self, mode: SelfSpeculative, depth: int, rounds: Rounds, layers: Collection[int]
    ) -> None:
        """Run all pieces of such rounds once, on padding, for every bound of keys."""
        choose = partial(self._draft_directly, mode, rounds)
        for bound in self._pieces.bounds:
            self._run_below(mode, rounds, bound, layers, 0, choose)
            self._check(mode, depth, rounds, bound, layers)

    def _run_below(
        self,
        mode: SelfSpeculative,
        rounds: Rounds,
        num_keys: NumKeys,
        layers: Collection[int],
        first: int,
        choose: Callable[[int], None],
    ) -> None:
        """Run rounds up to the exit; ``choose`` finds the drafts of all but the last of them."""
        below, last = _stops(0, mode.draft_exit, layers), len(rounds.sizes) - 1
        for number, (start, size) in enumerate(zip(rounds.starts, rounds.sizes, strict=True)):
            if number >= first:
                spans = _spans(0, below, size)
                self._pieces.run_layers(spans, num_keys, rounds.batch_size, start)
            if number < last:
                choose(number)

    def _check(
        self,
        mode: SelfSpeculative,
        depth: int,
        rounds: Rounds,
        num_keys: NumKeys,
        layers: Collection[int],
    ) -> None:
        """Run all rounds together from the exit on."""
        above = _stops(mode.draft_exit, depth, layers)
        spans = _spans(mode.draft_exit, above, rounds.num_rows)
        self._pieces.run_layers(spans, num_keys, rounds.batch_size)

    def drafts(
        self, rounds: Rounds, places: Mapping[Place, int], turn: int
    ) -> dict[int, list[int]]:
        """The drafts of each drafted item, once they were waited for."""
        return {
            index: self._memory.drafts(
                turn, [places[index, item.stop - 1 + number] for number in range(item.num_drafts)]
            )
            for index, item in rounds.items
            if item.num_drafts
        }

    def _draft(
        self, mode: SelfSpeculative, rounds: Rounds, places: Mapping[Place, int], number: int
    ) -> None:
        exit_mode = Exit(mode.draft_exit)
        rows = [
            LogitRow(
                index,
                item.stop - 1 + number,
                item.sequence,
                exit_mode,
                item.sequence.num_expected + number,
            )
            for index, item in rounds.items
            if item.num_drafts > number
        ]
        if all(map(self._chooser.is_direct, rows)):
            self._draft_directly(mode, rounds, number)
            return
        vocab = draft_vocab(mode, self._config.vocab_size)
        states = StateRows(self._pieces.states(mode.draft_exit), places)
        for part in self._chooser.draft_slices(rows):
            part.keep(mode.draft_exit, states)
            own = [places[row.item, row.position] for row in part.rows]
            self._memory.put("drafts", own, self._chooser.drafts(part, vocab))

    def _draft_directly(self, mode: SelfSpeculative, rounds: Rounds, number: int) -> None:
        vocab = draft_vocab(mode, self._config.vocab_size)
        start, size = rounds.starts[number], rounds.sizes[number]
        self._pieces.draft(Head(mode.draft_exit), vocab, start, size, rounds.batch_size)


def _drafting(item: ScheduledSequence) -> SelfSpeculative:
    mode = item.sequence.request.decoding
    assert isinstance(mode, SelfSpeculative), "only these have drafts"
    return mode


def _stops(start: int, stop: int, layers: Collection[int]) -> list[int]:
    """The layers to stop after between two, at the second and where outputs are kept."""
    return sorted({stop, *(at for at in layers if start < at < stop)})


def _spans(start: int, stops: Sequence[int], num_rows: int) -> list[Segment]:
    return [
        Segment(first, stop, num_rows) for first, stop in zip([start, *stops], stops, strict=False)
    ]
