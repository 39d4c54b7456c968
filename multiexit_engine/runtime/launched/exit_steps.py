"""Launched steps in which rows choose their exit: which ones can be, and what they are given.

Joins the rows of requests with the pieces that run them. Knows nothing of how a measure is computed
or of how layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from multiexit_engine.batch import ScheduledBatch, StepOutput
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.ops.exit_rows import IS_COPIED, RUNS_ANYHOW
from multiexit_engine.params import DecodingMode, EarlyExit, Exit, Original
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.runtime.device.graphs import Pieces
from multiexit_engine.runtime.drafts.draft_rounds import Rounds
from multiexit_engine.runtime.launched.decode_memory import DecodeMemory, DecodeRow
from multiexit_engine.runtime.launched.decode_pieces import DecodePieces
from multiexit_engine.runtime.launched.decode_rows import waiting_row
from multiexit_engine.runtime.launched.edit_memory import EditRoom
from multiexit_engine.runtime.launched.exit_layout import (
    WAITING_ROWS,
    exit_layout,
    waits_after,
)
from multiexit_engine.runtime.launched.exit_memory import CHOOSES, WISHES, ExitMemory, ExitRow
from multiexit_engine.runtime.launched.exit_pieces import ExitPieces
from multiexit_engine.runtime.launched.exit_plan import (
    ExitStep,
    chooses_its_exit,
    draft_exit,
    exit_ways,
    looked_at,
    may_leave,
)
from multiexit_engine.runtime.launched.exit_scores import ExitScores, exit_scores
from multiexit_engine.runtime.launched.exit_tokens import ExitTokens
from multiexit_engine.runtime.launched.launched_step import LaunchedStep, Leaving
from multiexit_engine.runtime.launched.plain_rows import lists_best, num_edits_at_most
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes, WishedTokens
from multiexit_engine.runtime.rows.choosing import TokenChooser
from multiexit_engine.runtime.rows.chosen_rows import Choice, Coming, direct_choices
from multiexit_engine.runtime.rows.flight import Place
from multiexit_engine.runtime.rows.logit_rows import LogitRow

# fills the first rows of the decode memory with padding: those that get a token, and all
SendPadding: TypeAlias = Callable[[int, int], None]


class ExitSteps:
    """Says which steps these are, and runs them.

    Args:
        model: whose exits are chosen.
        memory: the rows of steps.
        exits: what is to be known besides.
        pieces: run the rows.
        chooser: says which rows need no look at their scores.
        max_batch_size: of sequences.
    """

    def __init__(
        self,
        model: MultiExitModel,
        memory: DecodeMemory,
        exits: ExitMemory,
        pieces: ExitPieces,
        chooser: TokenChooser,
        max_batch_size: int,
    ) -> None:
        self._config = model.config
        self._heads = model.heads
        self._memory = memory
        self._exits = exits
        self._pieces = pieces
        self._chooser = chooser
        # beside the rows that get a token and ends of prompts, with some padding
        self._most_waiting = memory.spare_row - 2 * max_batch_size - 8
        # whatever prompts end in a step, the same numbers of rows are run
        self._most_rows = memory.spare_row - max_batch_size
        self._announced: set[EarlyExit] = set()
        self._layers: dict[EarlyExit, frozenset[int]] = {}

    @classmethod
    def of(
        cls,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        states: ExitStates,
        chooser: TokenChooser,
        config: EngineConfig,
        memory: DecodeMemory,
        rows: DecodePieces,
        wished: WishedTokens,
        pieces: Pieces,
    ) -> ExitSteps:
        """For the model of an engine, in the memory of its other steps; see ``DecodeSteps``."""
        exits = ExitMemory(memory.spare_row + 1, model.config.num_layers, config.device)
        spare_slot = config.num_kv_blocks * config.block_size
        tokens = ExitTokens(model, memory, exits, rows, wished)
        parts = memory, exits, rows, tokens, pieces, spare_slot
        own = ExitPieces(model, kv_cache, states, *parts)
        return cls(model, memory, exits, own, chooser, config.max_batch_size)

    def fits(self, step: ExitStep, num_ends: int, most_edits: int) -> bool:
        """Whether there is room for a step.

        Args:
            step: the step.
            num_ends: rows behind all others.
            most_edits: that there is room for.
        """
        return (
            num_edits_at_most(step.wishing) <= most_edits
            and step.layout.num_rows + num_ends <= self._memory.spare_row
        )

    def step(
        self,
        batch: ScheduledBatch,
        among: Sequence[LogitRow],
        rounds: Rounds,
        before: LaunchedStep | None,
    ) -> ExitStep | None:
        """The rows of a step in which some choose their exit.

        Args:
            batch: the step.
            among: its rows that choose tokens.
            rounds: its rows that get one token each.
            before: the step whose rows are not known to have left or not, if there is one.
        """
        if not any(map(chooses_its_exit, batch.scheduled)):
            return None
        rows = [row for row in among if isinstance(row.mode, EarlyExit)]
        choosing = [pair for pair in rounds.items if chooses_its_exit(pair[1])]
        leaving = before.coming.leaving if before is not None else {}
        room = self._most_rows, self._most_waiting
        layout = exit_layout(choosing, leaving, rounds.num_rows, *room)
        modes = {row.mode for row in rows if isinstance(row.mode, EarlyExit)} | self._announced
        layers = {mode: self._layers_of(mode) for mode in modes}
        direct = self.chosen_in_pieces(rows)
        known = set(map(id, direct))
        looking = [row for row in rows if id(row) not in known]
        wishing = [row for row in direct if not self._chooser.takes_best(row)]
        last, drafting = self._config.num_layers, draft_exit(rounds.items)
        return ExitStep(rows, wishing, looking, layout, rounds, layers, last, drafting)

    def chosen_in_pieces(self, rows: Sequence[LogitRow]) -> list[LogitRow]:
        """Those of some rows that choose their exit, and want no look at whole distributions."""
        own = (row for row in rows if isinstance(row.mode, EarlyExit))
        return [row for row in own if self._chooser.is_direct(row, fused=True)]

    def scores(self, rows: Sequence[LogitRow]) -> list[ExitScores]:
        """Those of some rows that score with an exit that each chooses."""
        modes = {row.mode for row in rows if isinstance(row.mode, EarlyExit)}
        return exit_scores(self._heads, rows, {mode: self._layers_of(mode) for mode in modes})

    def waiting_rows(self, step: ExitStep) -> dict[int, DecodeRow]:
        """What the decode memory has to know of the rows that wait."""
        owners = {index: item.sequence for index, item in step.rounds.items}
        return {
            row: waiting_row(owners[index], position)
            for (index, position), row in step.layout.places.items()
        }

    def send(self, step: ExitStep, turn: int, places: Mapping[Place, int], num_ends: int) -> None:
        """Copy what the device has to know of a step to it.

        Args:
            step: the step.
            turn: which twin of the memory.
            places: the rows of all positions.
            num_ends: rows behind all others.
        """
        rows = [ExitRow(0)] * (step.layout.num_rows + num_ends)
        items = dict(step.rounds.items)
        owners = {index: places[index, item.stop - 1] for index, item in items.items()}
        for index, own in owners.items():
            item = items[index]
            depth = item.sequence.request.depth
            rows[own] = ExitRow(own, depth=depth)
            for position in range(item.stop, item.stop + item.num_drafts):
                place = places[index, position]
                rows[place] = ExitRow(place, step.draft_exit or 0, depth)
        for (index, position), layer in step.layout.joins.items():
            flags = IS_COPIED if items[index].sequence.request.copies_kv else 0
            flags |= RUNS_ANYHOW if index in step.layout.completed else 0
            source = step.layout.sources.get(index, -1)
            way = owners[index], layer, self._config.num_layers, flags
            rows[places[index, position]] = ExitRow(*way, source=source)
        wishing = set(map(id, step.wishing))
        for row in step.rows:
            flags = CHOOSES | (WISHES if id(row) in wishing else 0)
            flags |= 0 if may_leave(row) else RUNS_ANYHOW
            place = places[row.item, row.position]
            assert isinstance(row.mode, EarlyExit), "only these choose"
            layers = self._layers_of(row.mode)
            rows[place] = ExitRow(*rows[place][:3], flags, row.mode, layers)
        self._exits.send(turn, rows)

    def leaving(self, step: ExitStep, places: Mapping[Place, int]) -> dict[TokenSequence, Leaving]:
        """The rows that may leave, by their sequences."""
        running = dict(step.rounds.items)
        return {
            row.sequence: Leaving(places[row.item, row.position], row.item in step.layout.completed)
            for row in step.rows
            if row.item in running and may_leave(row)
        }

    def run(self, step: ExitStep, layers: Collection[int], draft: Callable[[], None]) -> None:
        """Run the layers of all rows that get one token each, and of what waits for them.

        Args:
            step: the step.
            layers: whose outputs others look at.
            draft: is called when the first round has come to the exit that drafts, and runs the
                others so far.
        """
        depths = {item.sequence.request.depth for _, item in step.rounds.items}
        stops = sorted({*layers, *step.layers, *depths} - {0})
        size, num_own = step.layout.num_rows, step.rounds.num_rows
        what = step.ways, size, num_own, step.rounds.num_keys
        below = [0, *(stop for stop in stops if stop <= (step.draft_exit or 0))]
        self._pieces.run_layers(below, *what)
        draft()
        self._pieces.run_layers([below[-1], *(stop for stop in stops if stop > below[-1])], *what)
        self._pieces.keep(stops[-1], size, num_own)

    def announce(self, mode: EarlyExit) -> set[int]:
        """Let all steps be asked what rows of a mode are; gives the layers that this looks at."""
        self._announced.add(mode)
        return looked_at({mode: self._layers_of(mode)}) | {self._config.num_layers}

    def warm_up(
        self,
        mode: EarlyExit,
        num_own: int,
        wishes: Sequence[HeadWishes],
        stops: Collection[int],
        send: SendPadding,
    ) -> None:
        """Run every piece of steps in one announced mode once, on padding.

        Args:
            mode: the mode.
            num_own: rows that get a token.
            wishes: what some of them may want besides the best token.
            stops: layers after which spans end.
            send: fills so many rows of the decode memory with padding.
        """
        stops, most = sorted(stops), self._most_rows
        for size in sorted({min(num_own + waiting, most) for waiting in WAITING_ROWS}):
            send(num_own, size)
            self._exits.send(0, [ExitRow(0)] * size)
            for own in ([None], wishes):
                self._run_once(stops, size, num_own, own)

    def begin(self) -> None:
        """Get ready for ends of prompts, where no rows are run here."""
        self._exits.begin()

    def choose(
        self,
        step: ExitStep,
        turn: int,
        places: Mapping[Place, int],
        num_ends: int,
        edits: EditRoom,
    ) -> Coming[Choice]:
        """Choose the tokens of these rows, and fetch what became of them.

        Args:
            step: the step.
            turn: which twin of the memory.
            places: the rows of all positions.
            num_ends: rows behind all others.
            edits: the room of what is done to scores.
        """
        own, first = step.rounds.num_rows, step.layout.num_rows
        wishes = step.wishes(edits)
        if step.has_stream:
            self._pieces.choose(own, step.ways, wishes)
        running = dict(step.rounds.items)
        if any(row.item not in running for row in step.rows):
            self._pieces.choose_at_ends(slice(first, first + num_ends), step.ways, wishes)
        looked = None
        if step.looking:
            rows = [places[row.item, row.position] for row in step.looking]
            scores = self._pieces.scores(rows, step.ways)
            looked = self._chooser.choose_from([*step.looking], scores)
            if looked.tokens is not None:
                rows = [places[row.item, row.position] for row in looked.rows]
                self._memory.put("tokens", rows, looked.tokens)
        self._exits.fetch(turn)
        return self._coming(step, turn, places, looked)

    def _coming(
        self,
        step: ExitStep,
        turn: int,
        places: Mapping[Place, int],
        looked: Coming[Choice] | None,
    ) -> Coming[Choice]:
        """What the rows give, once they were waited for."""
        own = [places[row.item, row.position] for row in step.rows]
        running = dict(step.rounds.items)

        def read(output: StepOutput) -> list[tuple[LogitRow, Choice]]:
            tokens, logprobs, _ = self._memory.found(turn, own)
            decided = []
            for row, (left, value) in zip(step.rows, self._exits.found(turn, own), strict=True):
                decided.append(row.decided(Exit(left) if left else Original(), value))
                if left and row.item in running and may_leave(row):
                    is_completed = row.item in step.layout.completed
                    entries = waits_after(row.sequence, row.position, left, is_completed)
                    output.waiting[row.sequence] = entries
            told = self._memory.told(turn, own) if any(map(lists_best, step.rows)) else ()
            found = direct_choices(decided, tokens, logprobs, told)
            choices = dict(zip(map(id, step.rows), found, strict=True))
            for row, choice in looked.read(output) if looked is not None else ():
                choices[id(row)] = choices[id(row)][0], choice
            return [*choices.values()]

        return Coming(step.rows, None, read)

    def _run_once(
        self,
        stops: Sequence[int],
        size: int,
        num_own: int,
        wishes: Sequence[HeadWishes | None],
    ) -> None:
        layers = {mode: self._layers_of(mode) for mode in self._announced}
        ways = exit_ways(layers, size > num_own, wishes[0] is not None)
        for bound in self._pieces.bounds:
            self._pieces.run_layers([0, *stops], ways, size, num_own, bound)
        self._pieces.keep(stops[-1], size, num_own)
        for each in wishes:
            self._pieces.choose(num_own, ways, each)

    def _layers_of(self, mode: DecodingMode) -> frozenset[int]:
        assert isinstance(mode, EarlyExit), "only these choose"
        if mode not in self._layers:
            exits = resolve_mode(mode, self._config).exits
            self._layers[mode] = frozenset(head.layer for head in exits)
        return self._layers[mode]
