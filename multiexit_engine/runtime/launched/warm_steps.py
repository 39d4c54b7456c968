"""Runs every piece of modes' steps once, on padding, so that all are captured beforehand.

Steps of several modes stop wherever one of them has an exit, so that spans of layers are the same
whoever is there. Knows which numbers of rows, keys and drafts steps may have; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from multiexit_engine.config import EngineConfig, ModelConfig
from multiexit_engine.decoding.exits import gives_tokens
from multiexit_engine.decoding.plan import ExitPlan, ExitPlanner, plan_segments, target_mode
from multiexit_engine.modes import MAX_DRAFT_LEN
from multiexit_engine.params import (
    Contrast,
    DecodingMode,
    EarlyExit,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from multiexit_engine.runtime.device.graphs import Pieces
from multiexit_engine.runtime.launched.decode_memory import DecodeMemory
from multiexit_engine.runtime.launched.decode_pieces import DecodePieces
from multiexit_engine.runtime.launched.edit_memory import EditMemory
from multiexit_engine.runtime.launched.exit_steps import ExitSteps
from multiexit_engine.runtime.launched.piece_drafter import PieceDrafter
from multiexit_engine.runtime.launched.warm_wishes import most_edits, possible_wishes
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes
from multiexit_engine.transfer import wait_for

_TURN = 0


class WarmUp:
    """Captures the steps of one model.

    Args:
        model: its shape.
        config: the engine's limits.
        memory: the rows of steps.
        edits: what is done to their scores.
        pieces: run the rows.
        drafter: runs those that draft.
        exit_steps: run those that choose their exit.
        graphs: how pieces run.

    Attributes:
        stops: layers after which spans end, those of all modes so far.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        memory: DecodeMemory,
        edits: EditMemory,
        pieces: DecodePieces,
        drafter: PieceDrafter,
        exit_steps: ExitSteps,
        graphs: Pieces,
    ) -> None:
        self._planner = ExitPlanner(model)
        self._config = config
        self._memory = memory
        self._edits = edits
        self._pieces = pieces
        self._drafter = drafter
        self._exit_steps = exit_steps
        self._graphs = graphs
        self._modes: dict[DecodingMode, tuple[int, Sequence[SamplingParams]]] = {}
        self.stops: set[int] = set()

    def run(self, mode: DecodingMode, depth: int, sampling: Sequence[SamplingParams]) -> None:
        """Run the pieces of one mode, and of those before it where its exits divide their spans.

        Args:
            mode: whose heads are loaded.
            depth: layers that it runs.
            sampling: what rows ask for besides a greedy token, or one drawn by temperature,
                ``top_k`` and its kin.
        """
        self._modes[mode] = depth, sampling
        target, before = target_mode(mode), self.stops
        if isinstance(target, EarlyExit):
            self.stops = before | self._exit_steps.announce(target) - {0}
        else:
            self.stops = before | {depth, *self._planner.plan([target]).rows_at} - {0}
        if isinstance(mode, SelfSpeculative):
            self.stops |= {mode.draft_exit}
        changed = self._modes if self.stops != before or isinstance(target, EarlyExit) else [mode]
        self._graphs.is_warm = False
        for each in [*changed]:
            self._run_mode(each, *self._modes[each])
        self._graphs.is_warm = True
        wait_for(self._config.device)

    def _run_mode(self, mode: DecodingMode, depth: int, sampling: Sequence[SamplingParams]) -> None:
        target, sizes = target_mode(mode), self._pieces.sizes
        if any(wishes.edits.num_edits for wishes in self._wishes(target, sampling, sizes[-1])):
            self._pieces.note_latest(sizes[0])
        if isinstance(target, EarlyExit):
            for size in sizes:
                wishes = self._wishes(target, sampling, size)
                self._exit_steps.warm_up(target, size, wishes, self.stops, self._send_padding)
            return
        plan = self._planner.plan([target])
        for size in sizes:
            wishes = self._wishes(target, sampling, size)
            self._run_plain(target, depth, plan, size, wishes)
            if isinstance(mode, SelfSpeculative):
                self._run_drafts(mode, depth, plan, size, wishes)

    def _run_plain(
        self,
        mode: DecodingMode,
        depth: int,
        plan: ExitPlan,
        size: int,
        wishes: Sequence[HeadWishes],
    ) -> None:
        """Steps without drafts."""
        self._send_padding(size, size)
        segments = plan_segments([depth] * size, self._stops_below(depth) | {*plan.rows_at})
        for bound in self._pieces.bounds:
            self._pieces.run_layers(segments, bound, size)
        for are_listed in (False, True):
            self._choose(mode, plan, size, size, are_listed, wishes)

    def _run_drafts(
        self,
        mode: SelfSpeculative,
        depth: int,
        plan: ExitPlan,
        size: int,
        wishes: Sequence[HeadWishes],
    ) -> None:
        """Steps in which some sequences draft."""
        most = MAX_DRAFT_LEN if mode.draft_len == "auto" else mode.draft_len
        for num_drafts in range(1, most + 1):
            rounds = self._drafter.even_rounds(size, 1 + num_drafts)
            if rounds.num_rows > self._memory.spare_row:
                break
            self._send_padding(rounds.num_rows, rounds.num_rows)
            self._drafter.warm_up(mode, depth, rounds, self._stops_below(depth))
            self._choose(target_mode(mode), plan, rounds.num_rows, size, False, wishes)

    def _choose(
        self,
        mode: DecodingMode,
        plan: ExitPlan,
        num_rows: int,
        batch: int,
        are_listed: bool,
        wishes: Sequence[HeadWishes],
    ) -> None:
        if isinstance(mode, Original | Exit | Contrast) and gives_tokens(mode):
            group = replace(plan.groups[0], rows=tuple(range(num_rows)))
            for each in wishes:
                self._pieces.choose([group], batch, are_listed, each)

    def _stops_below(self, depth: int) -> set[int]:
        return {stop for stop in self.stops if stop <= depth}

    def _wishes(
        self, mode: DecodingMode, sampling: Sequence[SamplingParams], size: int
    ) -> list[HeadWishes]:
        """Of rows in steps of so many."""
        count = size * most_edits(sampling, self._config.max_model_len)
        return possible_wishes(mode, sampling, min(self._edits.most, count))

    def _send_padding(self, num_own: int, size: int) -> None:
        """Fill the first rows with padding: those that get a token, and others."""
        wait_for(self._config.device)
        self._memory.send(_TURN, [None] * num_own, [None] * (size - num_own), [[]])
