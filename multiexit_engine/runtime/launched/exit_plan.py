"""A step in which rows choose their exit: which ones, how they lie, and what they need.

Host data only. Knows nothing of tensors, or of how such a step runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from multiexit_engine.batch import ScheduledSequence
from multiexit_engine.ops.exit_rows import MEASURES
from multiexit_engine.params import EarlyExit, SelfSpeculative
from multiexit_engine.runtime.drafts.draft_rounds import Items, Rounds
from multiexit_engine.runtime.launched.edit_memory import EditRoom
from multiexit_engine.runtime.launched.exit_layout import ExitLayout
from multiexit_engine.runtime.launched.exit_pieces import ExitWays
from multiexit_engine.runtime.launched.exit_questions import Question
from multiexit_engine.runtime.launched.plain_rows import head_wishes
from multiexit_engine.runtime.launched.wished_tokens import HeadWishes
from multiexit_engine.runtime.rows.logit_rows import LogitRow


@dataclass(frozen=True)
class ExitStep:
    """A step in which rows choose their exit.

    Attributes:
        rows: that do.
        wishing: those of them that want more than the best token.
        looking: those that want their whole distributions.
        layout: of the rows that run.
        rounds: the rows that get a token each.
        layers_of: of each of their modes, and others that are announced, the layers at which it
            asks.
        num_layers: of the model.
        draft_exit: after which others are drafted and go on with these, if any are.
    """

    rows: Sequence[LogitRow]
    wishing: Sequence[LogitRow]
    looking: Sequence[LogitRow]
    layout: ExitLayout
    rounds: Rounds
    layers_of: Mapping[EarlyExit, frozenset[int]]
    num_layers: int
    draft_exit: int | None = None

    @property
    def has_stream(self) -> bool:
        """Whether rows that choose run here, not only ends of prompts."""
        return any(chooses_its_exit(item) for _, item in self.rounds.items)

    @cached_property
    def layers(self) -> set[int]:
        """Layers whose outputs are looked at, or rows are joined after."""
        joined = {*self.layout.joins.values(), self.draft_exit or self.num_layers}
        return looked_at(self.layers_of) | {self.num_layers} | joined

    @cached_property
    def ways(self) -> ExitWays:
        """What the rows need beside their layers."""
        return exit_ways(
            self.layers_of,
            has_waiting=bool(self.layout.joins),
            has_wishes=bool(self.wishing or self.looking),
        )

    def wishes(self, edits: EditRoom) -> HeadWishes | None:
        """What rows want beside the best token, if any do, whose edits have this room."""
        return head_wishes(self.wishing, edits) if self.wishing else None


def chooses_its_exit(item: ScheduledSequence) -> bool:
    """Whether rows of an item do."""
    return isinstance(item.sequence.request.decoding, EarlyExit)


def draft_exit(items: Items) -> int | None:
    """The exit that drafts for some items, if any are drafted."""
    modes = (item.sequence.request.decoding for _, item in items if item.num_drafts)
    return next((mode.draft_exit for mode in modes if isinstance(mode, SelfSpeculative)), None)


def may_leave(row: LogitRow) -> bool:
    """Prompts run through all layers, as where the host decides."""
    return row.position >= len(row.sequence.request.prompt_token_ids)


def looked_at(layers_of: Mapping[EarlyExit, frozenset[int]]) -> set[int]:
    """Layers whose outputs some modes look at; 0 for the embeddings."""
    found = {layer for layers in layers_of.values() for layer in layers}
    for mode, layers in layers_of.items():
        if mode.measure == "similarity":
            found |= {layer - 1 for layer in layers}
    return found


def exit_ways(
    layers_of: Mapping[EarlyExit, frozenset[int]],
    has_waiting: bool,
    has_wishes: bool,
) -> ExitWays:
    """What rows of some modes need beside their layers."""
    asked = sorted({layer for layers in layers_of.values() for layer in layers})
    questions = tuple(
        (layer, _question([mode for mode, layers in layers_of.items() if layer in layers]))
        for layer in asked
    )
    keeps_heads = has_wishes or any(m.measure in ("similarity", "probe") for m in layers_of)
    has_copied = has_waiting and any(mode.kv == "copy" for mode in layers_of)
    return ExitWays(questions, keeps_heads, has_waiting, has_copied)


def _question(asking: Sequence[EarlyExit]) -> Question:
    kinds = {MEASURES.index(mode.measure) for mode in asking}
    shortlists = {mode.shortlist for mode in asking if mode.shortlist is not None}
    return Question(sum(1 << kind for kind in kinds), tuple(sorted(shortlists)))
