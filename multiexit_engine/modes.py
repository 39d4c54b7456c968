"""Decoding modes: which heads one request takes its tokens from. Plain data.

Values are checked here as far as they can be without a model; what a model allows is checked by
``decoding.plan``, and how they are written by ``mode_forms``. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from multiexit_engine.checks import is_finite, is_int, reject
from multiexit_engine.parallel_mode import Parallel

if TYPE_CHECKING:
    from torch import Tensor

Layer: TypeAlias = int | Literal["original"]
MAX_DRAFT_LEN = 16
# most tokens that are checked at one place of a draft
MAX_CHOICES = 8


@dataclass(frozen=True, slots=True)
class Original:
    """The model's own head on its last layer. Exact: plain decoding."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The head of one exit; deeper layers are not run. Exact: the checkpoint's exit.

    Attributes:
        layer: 1-based layer of the exit.
    """

    layer: int

    def __post_init__(self) -> None:
        if not is_int(self.layer) or self.layer < 1:
            raise reject("Exit.layer", self.layer, "a layer number, 1 or more")


@dataclass(frozen=True, slots=True)
class Contrast:
    """Auto-contrastive decoding: an upper exit corrected by what a lower one expects.

    Among the plausible tokens (``p_upper >= alpha * max p_upper``) mass is shared in proportion to
    ``p_upper / p_lower``; all other tokens keep ``p_upper``. Exact up to rounding, computed in
    float32 log space, never NaN.

    Attributes:
        upper: 1-based exit layer, or "original" for the model's own head.
        lower: 1-based exit layer. Equal to ``upper`` it makes the plausible tokens equally likely.
        alpha: plausibility threshold relative to the most likely token; 1 and more keeps only that
            token (and ties), 0 and less all tokens.
        min_candidates: the plausible set has at least this many tokens.
        function: replaces the formula: takes float32 logits of the upper and of the lower exit,
            both ``[1, 1, vocab]``, returns scores of that shape; called once for every position.
            It costs both heads in full; alpha and min_candidates are then its own affair.

    Source: Gera et al. 2023, arXiv:2305.01628; IBM's ``calculate_contrasted_logits``.
    """

    upper: Layer
    lower: int
    alpha: float = 0.1
    min_candidates: int = 1
    function: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.upper != "original" and (not is_int(self.upper) or self.upper < 1):
            raise reject("Contrast.upper", self.upper, "a layer number, 1 or more, or 'original'")
        if not is_int(self.lower) or self.lower < 1:
            raise reject("Contrast.lower", self.lower, "a layer number, 1 or more")
        if not is_finite(self.alpha):
            raise reject("Contrast.alpha", self.alpha, "a finite number, usually in (0, 1]")
        if not is_int(self.min_candidates) or self.min_candidates < 0:
            raise reject("Contrast.min_candidates", self.min_candidates, "0 (all tokens) or more")
        if self.function is not None and not callable(self.function):
            raise reject("Contrast.function", self.function, "callable or None")


@dataclass(frozen=True, slots=True)
class DoLa:
    """Decoding by contrasting layers: the mature head against the layer that differs most from it.

    For every token the premature layer is the candidate whose distribution q is farthest, in
    Jensen-Shannon divergence, from the mature one p. Tokens with ``p >= relative_top * max p``
    score ``log p - log q``; all others are ruled out. Each row chooses alone, where the published
    code averages the divergences over the batch. Exact up to rounding, in float32 log space.

    Attributes:
        candidates: layers from 0 (the embeddings) to below the mature one; a single one is always
            taken. "low" and "high" are every other layer of the lower and upper half, as
            transformers picks them.
        relative_top: plausibility threshold relative to the most likely token, in [0, 1]; 0 keeps
            all tokens.
        jsd: how layers are compared: "exact" by the Jensen-Shannon divergence; "reference" by the
            mean over the vocabulary of M log(M/P) and M log(M/Q), as transformers 4.55 does.
        mature: 1-based exit layer, or "original" for the model's own head.
        heads: what reads the candidates: "raw", the model's own head on hidden states without the
            final norm, as published; "exits", the checkpoint's exits.

    Source: Chuang et al. 2023, arXiv:2309.03883; ``_dola_select_contrast`` of transformers 4.55.
    """

    candidates: tuple[int, ...] | Literal["low", "high"]
    relative_top: float = 0.1
    jsd: Literal["exact", "reference"] = "exact"
    mature: Layer = "original"
    heads: Literal["raw", "exits"] = "raw"

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, str):
            given: Any = self.candidates
            layers = given if isinstance(given, list | tuple) else (given,)
            object.__setattr__(self, "candidates", tuple(layers))
        self._check_candidates()
        if not is_finite(self.relative_top) or not 0 <= self.relative_top <= 1:
            raise reject("DoLa.relative_top", self.relative_top, "in [0, 1]")
        if self.jsd not in ("exact", "reference"):
            raise reject("DoLa.jsd", self.jsd, "'exact' or 'reference'")
        if self.mature != "original" and (not is_int(self.mature) or self.mature < 1):
            raise reject("DoLa.mature", self.mature, "a layer number, 1 or more, or 'original'")
        if self.heads not in ("raw", "exits"):
            raise reject("DoLa.heads", self.heads, "'raw' or 'exits'")

    def _check_candidates(self) -> None:
        if self.candidates in ("low", "high"):
            return
        layers = () if isinstance(self.candidates, str) else self.candidates
        numbers = all(is_int(layer) and layer >= 0 for layer in layers)
        if not layers or not numbers or len(set(layers)) < len(layers):
            raise reject(
                "DoLa.candidates", self.candidates, "different layers, 0 or more, 'low' or 'high'"
            )


Target: TypeAlias = Original | Exit | Contrast | DoLa


@dataclass(frozen=True, slots=True)
class SelfSpeculative:
    """Self-speculation: an early exit drafts tokens, the target mode checks them all at once.

    Lossless: each token is the one that ``target`` alone gives for the same seed, greedy or
    sampled; only rounding can tell, where the target's two best tokens are that close. Drafts are
    drawn with the target's own random numbers, so its distribution is exact, and the tokens depend
    neither on the drafts nor on their number.

    Attributes:
        draft_exit: 1-based exit whose head drafts; below the last layer of the target.
        draft_len: most tokens drafted for one check, or "auto": as many as pay, judged by the
            request's measured acceptance and the measured cost of drafts; none where none pays.
        target: the mode whose tokens come out: ``Original``, ``Exit``, ``Contrast`` or
            ``DoLa``.
        draft_vocab: drafts are chosen among this many tokens, the first ones of the vocabulary:
            byte-pair vocabularies begin with the frequent ones, and a head costs what is read of
            it. "auto" is a quarter of the vocabulary, at least 8192 tokens. Requests with
            penalties, masks or top-k draft from all tokens.
        tree: how many choices of the exit are checked at each place of the drafts, the first place
            first: (2, 1, 3) checks the exit's second choice of the first token and two more of the
            third, as far as so many are drafted. What is drafted goes on from the best choice
            alone. A number is that of the first place, True is 2, False is the chain alone. Kept
            as False or a tuple.

    Source: Leviathan et al. 2022, arXiv:2211.17192; drafting by an exit: Elhoushi et al. 2024,
        arXiv:2404.16710; drawing both with one noise: Daliri et al. 2024, arXiv:2408.07978; several
        choices at one place: Miao et al. 2023, arXiv:2305.09781.
    """

    draft_exit: int
    draft_len: int | Literal["auto"] = "auto"
    target: Target = Original()
    draft_vocab: int | Literal["auto"] = "auto"
    tree: bool | int | tuple[int, ...] = False

    def __post_init__(self) -> None:
        if not is_int(self.draft_exit) or self.draft_exit < 1:
            raise reject("SelfSpeculative.draft_exit", self.draft_exit, "a layer number, 1 or more")
        is_count = is_int(self.draft_len) and 1 <= self.draft_len <= MAX_DRAFT_LEN  # type: ignore[operator]
        if self.draft_len != "auto" and not is_count:
            allowed = f"'auto' or a number of tokens, 1..{MAX_DRAFT_LEN}"
            raise reject("SelfSpeculative.draft_len", self.draft_len, allowed)
        if not isinstance(self.target, get_args(Target)):
            raise reject("SelfSpeculative.target", self.target, "Original, Exit, Contrast or DoLa")
        is_size = is_int(self.draft_vocab) and self.draft_vocab >= 1  # type: ignore[operator]
        if self.draft_vocab != "auto" and not is_size:
            allowed = "'auto' or a number of tokens, 1 or more"
            raise reject("SelfSpeculative.draft_vocab", self.draft_vocab, allowed)
        object.__setattr__(self, "tree", self._choices() or False)

    @property
    def choices(self) -> tuple[int, ...]:
        """How many tokens are checked at each place of the drafts; beyond them one at each."""
        return self.tree if isinstance(self.tree, tuple) else ()

    def _choices(self) -> tuple[int, ...]:
        given: Any = {True: 2, False: ()}[self.tree] if isinstance(self.tree, bool) else self.tree
        counts = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not all(is_int(count) and 1 <= count <= MAX_CHOICES for count in counts):
            allowed = (
                f"a number of choices, 1..{MAX_CHOICES}, or several of these, or True or False"
            )
            raise reject("SelfSpeculative.tree", self.tree, allowed)
        while counts and counts[-1] == 1:
            counts = counts[:-1]
        most = MAX_DRAFT_LEN if self.draft_len == "auto" else self.draft_len
        if len(counts) > most:
            allowed = f"choices at {most} places at most, as draft_len={self.draft_len!r} drafts"
            raise reject("SelfSpeculative.tree", self.tree, allowed)
        return counts


Measure: TypeAlias = Literal["max_prob", "margin", "entropy", "similarity", "patience", "probe"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
# those that look at the distribution of one exit
HEAD_MEASURES: tuple[Measure, ...] = ("max_prob", "margin", "entropy")


@dataclass(frozen=True, slots=True)
class EarlyExit:
    """Each token leaves at the first exit that is sure of it.

    Approximate: a token is the one that the exit would choose, not the last layer. At every layer
    of ``layers`` the row that chooses the token is measured; where it passes, the exit's head
    chooses and the row skips the deeper layers. A row that passes nowhere takes the model's own
    head. Prompts run through all layers. Decisions depend on a request's own rows alone. The
    keys and values that deeper layers lack are computed before anything looks at them, ``kv`` says
    how.

    Attributes:
        threshold: what passes. At least this probability of the best token ("max_prob"),
            difference of the two best probabilities ("margin"), cosine between the outputs of the
            last two layers ("similarity"), number of exits in a row with the same best token
            ("patience"), or chance, told by a small classifier of the hidden state, that the exit's
            best token is that of the last layer ("probe"); at most this entropy in nats
            ("entropy").
        measure: what is measured. "probe" needs classifiers beside the model, which
            ``multiexit train probes`` makes; with them and "similarity" rows that stay read no
            head.
        layers: the exits that may be taken, ascending; None for all below the last layer.
        min_layer: no exit before this layer.
        shortlist: for "max_prob", "margin" and "entropy": look at this many tokens first, the
            first ones of the vocabulary, where byte-pair tokenizers have the frequent ones, and
            at the whole vocabulary only where those pass. None looks at all at once. A row leaves
            only if the whole vocabulary passes; it may stay although that would pass where the
            exit's best token is not on the list.
        calibrated: in the place of ``threshold``: the one that ``multiexit calibrate`` found to
            keep this share of full depth's tokens.
        kv: what a row that left gives the deeper layers. "recompute": it runs through them later,
            with the first row that goes there, so the cache is that of full depth. "copy": each of
            them computes, in the pass of that row, keys and values alone from the state in which
            the row left, as if the layers between had changed nothing; cheaper, and a second
            approximation.

    Source: Schuster et al. 2022, arXiv:2207.07061 (measures, and section 3.4, copied states); Zhou
        et al. 2020, arXiv:2006.04152 (patience); Chen et al. 2023, arXiv:2312.04916, section 4
        (keys and values computed later).
    """

    threshold: float | None = None
    measure: Measure = "max_prob"
    layers: tuple[int, ...] | None = None
    min_layer: int = 1
    shortlist: int | None = None
    calibrated: float | None = None
    kv: Literal["recompute", "copy"] = "recompute"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise reject("EarlyExit.measure", self.measure, f"one of {', '.join(MEASURES)}")
        self._check_threshold()
        if not is_int(self.min_layer) or self.min_layer < 1:
            raise reject("EarlyExit.min_layer", self.min_layer, "a layer number, 1 or more")
        if self.layers is not None:
            object.__setattr__(self, "layers", _ascending("EarlyExit.layers", self.layers))
        self._check_shortlist()
        if self.kv not in ("recompute", "copy"):
            raise reject("EarlyExit.kv", self.kv, "'recompute' or 'copy'")

    def _check_threshold(self) -> None:
        if (self.threshold is None) == (self.calibrated is None):
            raise ValueError(
                f"EarlyExit.threshold={self.threshold!r}, calibrated={self.calibrated!r}: give one "
                "of them"
            )
        if self.calibrated is not None:
            if not is_finite(self.calibrated) or not 0 < self.calibrated < 1:
                raise reject(
                    "EarlyExit.calibrated", self.calibrated, "a share of tokens, in (0, 1)"
                )
        elif not is_finite(self.threshold):
            raise reject("EarlyExit.threshold", self.threshold, "a finite number")
        elif self.measure == "patience" and self.threshold < 2:  # type: ignore[operator]
            raise reject("EarlyExit.threshold", self.threshold, "2 or more with 'patience'")

    def _check_shortlist(self) -> None:
        if self.shortlist is None:
            return
        if self.measure not in HEAD_MEASURES:
            allowed = f"None with measure={self.measure!r}, which reads no distribution"
            raise reject("EarlyExit.shortlist", self.shortlist, allowed)
        if not is_int(self.shortlist) or self.shortlist < 2:
            raise reject("EarlyExit.shortlist", self.shortlist, "a number of tokens, 2 or more")


def _ascending(name: str, value: Any) -> tuple[int, ...]:
    layers = tuple(value) if isinstance(value, list | tuple) else (value,)
    numbers = all(is_int(layer) and layer >= 1 for layer in layers)
    if not layers or not numbers or list(layers) != sorted(set(layers)):
        raise reject(name, value, "layer numbers, 1 or more, ascending")
    return layers


DecodingMode: TypeAlias = Target | SelfSpeculative | EarlyExit | Parallel
MODES: dict[str, type[DecodingMode]] = {
    "original": Original,
    "exit": Exit,
    "contrast": Contrast,
    "dola": DoLa,
    "self_speculative": SelfSpeculative,
    "parallel": Parallel,
    "early_exit": EarlyExit,
}
