"""What rows are asked at an exit on the device, and how their answers are noted.

Knows nothing of memories that stay, of pieces or of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multiexit_engine.decoding.gates import similarity
from multiexit_engine.layers.exit_heads import ExitHeads, Head
from multiexit_engine.ops import (
    ExitProgress,
    ExitRules,
    decide_exits,
    listed_head_statistics,
    rows_asked,
)
from multiexit_engine.ops.exit_rows import MEASURES

_OF_HEADS = sum(1 << place for place, kind in enumerate(MEASURES[:4]))
_SIMILARITY, _PROBE = (1 << MEASURES.index(kind) for kind in ("similarity", "probe"))


@dataclass(frozen=True, slots=True)
class Question:
    """What rows are asked at an exit: hashable, as a part of a piece's key.

    Attributes:
        kinds: bits of the measures.
        shortlists: numbers of tokens that some look at first, ascending.
    """

    kinds: int
    shortlists: tuple[int, ...]

    @property
    def compares(self) -> bool:
        """Whether the output of the layer before is looked at."""
        return bool(self.kinds & _SIMILARITY)


def ask_exit(
    heads: ExitHeads,
    layer: int,
    question: Question,
    states: Tensor,
    before: Tensor | None,
    here: Tensor,
    rules: ExitRules,
    progress: ExitProgress,
) -> Tensor:
    """Ask rows at an exit, and note who leaves; gives [rows, hidden], what its head reads.

    Args:
        heads: of the model.
        layer: 1-based, of the exit.
        question: what is asked.
        states: [rows, hidden] after the layer.
        before: the same after the layer before, where they are compared.
        here: [rows] uint8, whether a row is asked here if it has not left.
        rules: of all rows.
        progress: of all rows, written in place.
    """
    kinds = question.kinds
    operands = heads.operands(Head(layer), states)
    for shortlist in question.shortlists:
        asked = rows_asked(here, layer, _OF_HEADS, shortlist, rules, progress)
        found = listed_head_statistics(*operands.first(shortlist), asked)
        decide_exits(asked.before, layer, found, rules, progress, is_bound=True)
    if kinds & _OF_HEADS:
        asked = rows_asked(here, layer, _OF_HEADS, 0, rules, progress)
        found = listed_head_statistics(*operands, asked)
        decide_exits(asked.before, layer, found, rules, progress)
    if kinds & _SIMILARITY:
        assert before is not None, "it is compared"
        asked = rows_asked(here, layer, _SIMILARITY, 0, rules, progress)
        decide_exits(asked.before, layer, similarity(before, states), rules, progress)
    if kinds & _PROBE:
        asked = rows_asked(here, layer, _PROBE, 0, rules, progress)
        values = heads.probes.chances(layer, heads.normed(states))
        decide_exits(asked.before, layer, values, rules, progress)
    return operands.hidden
