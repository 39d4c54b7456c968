"""Plans: which layers and which heads a batch needs, and for which of its rows.

Host data only. Knows the modes and the shape of the model; nothing of tensors or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.modes import Target
from multiexit_engine.params import (
    Contrast,
    DecodingMode,
    DoLa,
    EarlyExit,
    Exit,
    Layer,
    Original,
    Parallel,
    SelfSpeculative,
)

ContrastFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
KEPT_PLANS = 8


@dataclass(frozen=True)
class ResolvedMode:
    """The heads of a decoding mode on one model.

    Attributes:
        upper: the head that gives the distribution.
        lower: the head it is contrasted with, None for a single head.
        depth: number of layers that must run.
        candidates: the heads of which DoLa contrasts it with one, chosen for each token.
        draft: the head that drafts, None where nothing is drafted.
        exits: the heads at which a token may leave before it comes to ``upper``, ascending.
    """

    upper: Head
    lower: Head | None
    depth: int
    candidates: tuple[Head, ...] = ()
    draft: Head | None = None
    exits: tuple[Head, ...] = ()

    @property
    def heads(self) -> tuple[Head, ...]:
        """All of them."""
        single = (self.upper, self.lower, self.draft)
        return (*(head for head in single if head is not None), *self.candidates, *self.exits)


@dataclass(frozen=True)
class HeadGroup:
    """Logit rows that use the same heads in the same way.

    Attributes:
        upper: their head.
        lower: the head they are contrasted with, if any.
        function: what contrasts them instead of the formula, if anything.
        rows: the logit rows, ascending.
        alphas: plausibility threshold of each row; empty without the formula.
        min_candidates: least size of each row's plausible set; empty without the formula.
        candidates: the heads that DoLa chooses from for each row, if it does.
        jsd: how it compares them.
    """

    upper: Head
    lower: Head | None
    function: ContrastFunction | None
    rows: tuple[int, ...]
    alphas: tuple[float, ...] = ()
    min_candidates: tuple[int, ...] = ()
    candidates: tuple[Head, ...] = ()
    jsd: str = "exact"

    @property
    def has_plausible_set(self) -> bool:
        """Whether the formula of a contrast is at work, which keeps the plausible tokens."""
        return self.lower is not None and self.function is None


@dataclass(frozen=True)
class ExitPlan:
    """What turns the hidden states of a step into scores.

    Attributes:
        groups: every logit row stands in exactly one of them.
        rows_at: for each tapped 1-based layer the logit rows, ascending, whose hidden state after
            that layer is needed; 0 stands for the embeddings.
        num_rows: logit rows of the step.
    """

    groups: tuple[HeadGroup, ...]
    rows_at: Mapping[int, tuple[int, ...]]
    num_rows: int


@dataclass(frozen=True)
class Segment:
    """Blocks ``start`` to ``stop`` (0-based, exclusive) for the first ``num_seqs`` sequences."""

    start: int
    stop: int
    num_seqs: int


def resolve_mode(mode: DecodingMode, config: ModelConfig) -> ResolvedMode:
    """The heads that a mode needs, and the depth it runs to.

    Raises:
        ValueError: the model lacks an exit that the mode names; the message names the field, the
            value, and the exits there are.
    """
    match mode:
        case Original():
            upper, lower = Head(config.num_layers, True), None
        case Exit(layer):
            upper, lower = _head("Exit.layer", layer, config), None
        case Contrast(upper=above, lower=below):
            upper = _head("Contrast.upper", above, config)
            lower = _head("Contrast.lower", below, config)
        case DoLa():
            return _resolve_dola(mode, config)
        case SelfSpeculative(draft_exit, target=target):
            return _with_draft(resolve_mode(target, config), draft_exit, config)
        case Parallel():
            raise ValueError(
                f"decoding={mode!r}: this model's decoder writes one token after the other; "
                "Parallel needs a checkpoint with ELMER's decoder, opened as architecture='elmer'"
            )
        case EarlyExit():
            return _resolve_early_exit(mode, config)
    return ResolvedMode(upper, lower, max(head.layer for head in (upper, lower) if head))


def _resolve_dola(mode: DoLa, config: ModelConfig) -> ResolvedMode:
    mature = _head("DoLa.mature", mode.mature, config)
    layers = mode.candidates
    if isinstance(layers, str):
        layers = dola_layers(layers, mature.layer, config.tie_word_embeddings)
    if not layers or max(layers) >= mature.layer:
        raise ValueError(
            f"DoLa.candidates={mode.candidates!r}: the mature head reads layer {mature.layer}; "
            f"name layers from 0 to {mature.layer - 1}"
        )
    if mode.heads == "exits":
        candidates = tuple(_head("DoLa.candidates", layer, config) for layer in layers)
    else:
        candidates = tuple(Head(layer, is_raw=True) for layer in layers)
    return ResolvedMode(mature, None, mature.layer, candidates)


def dola_layers(preset: str, num_layers: int, is_tied: bool) -> tuple[int, ...]:
    """The layers of DoLa's "low" or "high"; none where a tied model of three layers has no low.

    Args:
        preset: "low" or "high".
        num_layers: below which the layers lie.
        is_tied: the head is the token embedding; "low" then starts at layer 2, as the embeddings
            would only give back the token they came from.

    Source: ``_dola_decoding`` of transformers 4.55.
    """
    is_deep = num_layers > 40
    if preset == "high":
        return tuple(range(num_layers - 20 if is_deep else num_layers // 2, num_layers, 2))
    start = min(2, num_layers - 1) if is_tied else 0
    if start == num_layers // 2:
        return (start,)
    return tuple(range(start, 20 if is_deep else num_layers // 2, 2))


def target_mode(mode: DecodingMode) -> Target | EarlyExit:
    """The mode whose distribution a mode's tokens come from."""
    assert not isinstance(mode, Parallel), "resolve_mode refuses it"
    return mode.target if isinstance(mode, SelfSpeculative) else mode


def _with_draft(target: ResolvedMode, draft_exit: int, config: ModelConfig) -> ResolvedMode:
    draft = _head("SelfSpeculative.draft_exit", draft_exit, config)
    if draft.layer >= target.depth:
        raise ValueError(
            f"SelfSpeculative.draft_exit={draft_exit}: must be below layer {target.depth}, which "
            "its target runs to"
        )
    return replace(target, draft=draft)


def _resolve_early_exit(mode: EarlyExit, config: ModelConfig) -> ResolvedMode:
    last = config.num_layers
    layers = mode.layers
    if layers is None:
        layers = tuple(layer for layer in config.exit_layers if layer < last)
    exits = tuple(_head("EarlyExit.layers", layer, config) for layer in layers)
    if mode.layers is not None and layers[-1] >= last:
        raise ValueError(
            f"EarlyExit.layers={mode.layers!r}: name exits below layer {last}, the last one"
        )
    exits = tuple(head for head in exits if head.layer >= mode.min_layer)
    if not exits:
        exits_there = ", ".join(map(str, config.exit_layers)) or "none"
        raise ValueError(
            f"EarlyExit.min_layer={mode.min_layer}, layers={mode.layers!r}: leave no exit below "
            f"the last layer, {last}; this model's exits: {exits_there}"
        )
    if mode.shortlist is not None and mode.shortlist > config.vocab_size:
        raise ValueError(
            f"EarlyExit.shortlist={mode.shortlist}: the vocabulary has {config.vocab_size} tokens"
        )
    return ResolvedMode(Head(last, True), None, last, exits=exits)


def _head(field: str, layer: Layer, config: ModelConfig) -> Head:
    if layer == "original":
        return Head(config.num_layers, True)
    if not config.exit_layers:
        raise ValueError(
            f"{field}={layer!r}: this model has no exits; to read its own head from earlier layers "
            "pass lm_head_layer_indices together with "
            "vocab_projection_mode='SHARED_PROJECTION_DIRECT'"
        )
    if layer not in config.exit_layers:
        exits = ", ".join(map(str, config.exit_layers))
        raise ValueError(f"{field}={layer!r}: this model has exits at layers {exits}")
    return Head(layer, False)


def plan_exits(modes: Sequence[DecodingMode], config: ModelConfig) -> ExitPlan:
    """Group logit rows by the heads of their modes.

    Args:
        modes: one for each logit row of the step.
        config: shape of the model.

    Raises:
        ValueError: as ``resolve_mode``.
    """
    # By identity: a custom function need not be hashable.
    distinct = {id(mode): mode for mode in modes}
    resolved = {key: resolve_mode(mode, config) for key, mode in distinct.items()}
    members: dict[tuple[ResolvedMode, int, str], list[int]] = {}
    rows_at: dict[int, list[int]] = {}
    for row, mode in enumerate(modes):
        heads = resolved[id(mode)]
        jsd = mode.jsd if isinstance(mode, DoLa) else ""
        members.setdefault((heads, id(_function(mode)), jsd), []).append(row)
        for layer in {head.layer for head in heads.heads}:
            rows_at.setdefault(layer, []).append(row)
    return ExitPlan(
        groups=tuple(_group(heads, rows, modes) for (heads, *_), rows in members.items()),
        rows_at={layer: tuple(rows) for layer, rows in sorted(rows_at.items())},
        num_rows=len(modes),
    )


class ExitPlanner:
    """``plan_exits`` of one model; keeps a few plans, since most steps run the same requests.

    Attributes:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._kept: dict[tuple[int, ...], tuple[list[DecodingMode], ExitPlan]] = {}

    def plan(self, modes: list[DecodingMode]) -> ExitPlan:
        """See ``plan_exits``."""
        # The modes are kept beside their plan, so that their ids stay theirs.
        key = tuple(map(id, modes))
        if key not in self._kept:
            if len(self._kept) == KEPT_PLANS:
                self._kept.clear()
            self._kept[key] = modes, plan_exits(modes, self.config)
        return self._kept[key][1]


def _function(mode: DecodingMode) -> ContrastFunction | None:
    return mode.function if isinstance(mode, Contrast) else None


def _group(heads: ResolvedMode, rows: list[int], modes: Sequence[DecodingMode]) -> HeadGroup:
    function = _function(modes[rows[0]])
    group = HeadGroup(heads.upper, heads.lower, function, tuple(rows))
    own = [modes[row] for row in rows]
    if dolas := [mode for mode in own if isinstance(mode, DoLa)]:
        tops = tuple(float(mode.relative_top) for mode in dolas)
        return replace(group, alphas=tops, candidates=heads.candidates, jsd=dolas[0].jsd)
    contrasts = [mode for mode in own if isinstance(mode, Contrast) and function is None]
    return replace(
        group,
        alphas=tuple(float(mode.alpha) for mode in contrasts),
        min_candidates=tuple(mode.min_candidates for mode in contrasts),
    )


def plan_segments(depths: Sequence[int], tap_layers: Collection[int]) -> tuple[Segment, ...]:
    """Cut the layers wherever hidden states are tapped or sequences stop.

    Args:
        depths: number of layers of each sequence, never rising.
        tap_layers: 1-based layers after which hidden states are kept, none beyond the depths; 0
            makes an empty segment, after which the embeddings are kept.

    Returns:
        Segments from layer 0 to the greatest depth, without gaps; each for the sequences that run
        all of it.
    """
    segments: list[Segment] = []
    start = 0
    for stop in sorted({*depths, *tap_layers}):
        segments.append(Segment(start, stop, sum(depth >= stop for depth in depths)))
        start = stop
    return tuple(segments)
