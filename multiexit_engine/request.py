"""A request and its sequences while they live in the engine: host data only, no tensors."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from multiexit_engine.grammar import Grammar
from multiexit_engine.outputs import FinishReason
from multiexit_engine.params import DecodingMode, EarlyExit, SamplingParams
from multiexit_engine.score_edits import TextEdits


class ChosenToken(NamedTuple):
    """A new token; ``alternatives`` are (id, log-probability), best first, when asked for.

    ``exit_layer`` and ``confidence`` are those of a token that chose its exit itself,
    ``premature_layer`` is what DoLa contrasted it with.
    """

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    exit_layer: int | None = None
    confidence: float | None = None
    premature_layer: int | None = None

    def after(self, premature_layer: int) -> ChosenToken:
        """The token with what it was contrasted with; -1 stands for nothing."""
        return self._replace(premature_layer=premature_layer) if premature_layer >= 0 else self


class ScoredToken(NamedTuple):
    """A given token's place in its mode's distribution."""

    token_id: int
    logprob: float
    rank: int
    is_greedy: bool
    alternatives: tuple[tuple[int, float], ...] = ()


class Joining(NamedTuple):
    """Earlier rows of a sequence that go on from states kept at a layer.

    Attributes:
        layer: the 1-based layer after which the states were kept.
        start: position of the first of them; they reach to the rows that they join.
    """

    layer: int
    start: int


class Held(NamedTuple):
    """A sequence's last row that waits at an exit for others to go deeper with it.

    Attributes:
        layer: of the exit, after which its state was kept.
        num_steps: in which it has waited.
        said: what the exits up to there said of it.
    """

    layer: int
    num_steps: int
    said: tuple[float, int | None, int]


class SequenceStatus(Enum):
    """Where a sequence stands with the scheduler."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


# what is expected where nothing has been checked
PRIOR_ACCEPTANCE = 0.7


@dataclass(slots=True)
class Acceptance:
    """How often drafts were accepted, the latest ones counting most.

    Attributes:
        half_life: checked drafts after which what was learned before counts half.
        prior_weight: checked drafts that what was expected before any is worth.
        num_drafted: drafts that were checked since it began.
        num_accepted: those of them that were accepted.
    """

    half_life: float = 24.0
    prior_weight: float = 8.0
    num_drafted: int = 0
    num_accepted: int = 0
    _tried: float = 0.0
    _passed: float = 0.0

    def record(self, num_drafts: int, num_accepted: int) -> None:
        """Count a step that checked ``num_drafts``, of which the first ``num_accepted`` passed."""
        self.num_drafted += num_drafts
        self.num_accepted += num_accepted
        # drafts after the first wrong one tell nothing
        tried = min(num_accepted + 1, num_drafts)
        kept = 0.5 ** (tried / self.half_life)
        self._tried = self._tried * kept + tried
        self._passed = self._passed * kept + num_accepted

    @property
    def rate(self) -> float:
        """Estimated chance that a draft is accepted when all before it were."""
        return self.rate_after(PRIOR_ACCEPTANCE)

    @property
    def weight(self) -> float:
        """Checked drafts that the estimate rests on, what was expected before any included."""
        return self._tried + self.prior_weight

    def rate_after(self, prior: float) -> float:
        """The same, if ``prior`` was what to expect before any draft was checked."""
        return (self._passed + prior * self.prior_weight) / (self._tried + self.prior_weight)


@dataclass(eq=False, slots=True)
class Sequence:
    """One growing row of tokens with KV blocks of its own.

    Attributes:
        request: the request it belongs to.
        index: which of the request's sequences (of ``n``, or of the beams).
        token_ids: prompt and output.
        num_computed_tokens: how many of them have keys and values in the cache.
        waiting: which of those lack the keys and values above some layer, in order of position,
            which is that of falling layers.
        held: of its last token, which then is among these, where it goes on; no next token is
            chosen before.
        block_table: ids of its KV blocks, in order.
        source_table: ids of the blocks with what the decoder's layers read of the source.
        chosen: its output tokens with what is known of each.
        cumulative_logprob: sum of the chosen tokens' log-probabilities; a beam's running score.
        exit_layers: for each output token the layer that chose it.
        drafted: for each output token whether it was drafted and accepted.
        confidences: for each output token of ``EarlyExit`` what its exit measured.
        acceptance: what became of its drafts.
        grammar: what its text may go on with, where its form is given.
        num_expected: tokens after its known ones that a step on the device is choosing.
    """

    request: Request
    index: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    waiting: tuple[Joining, ...] = ()
    held: Held | None = None
    block_table: list[int] = field(default_factory=list)
    source_table: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    chosen: list[ChosenToken] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    exit_layers: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=Acceptance)
    grammar: Grammar | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_expected: int = 0
    _edits: TextEdits | None = None

    @property
    def edits(self) -> TextEdits:
        """What is done to scores of its next token, which grows with it."""
        if self._edits is None:
            self._edits = TextEdits(self.request.sampling, self.request.prompt_token_ids)
        return self._edits

    @property
    def num_tokens(self) -> int:
        """Its tokens, those included that are only expected yet."""
        return len(self.token_ids) + self.num_expected

    def begin_again(self) -> None:
        """Wait for a turn with nothing computed."""
        self.num_computed_tokens = 0
        self.waiting, self.held = (), None
        self.status = SequenceStatus.WAITING

    @property
    def num_exact_tokens(self) -> int:
        """Tokens, from the first on, whose keys and values in the cache are of full depth."""
        count = self.waiting[0].start if self.waiting else self.num_computed_tokens
        return min(count, self.num_exact_at_most)

    @property
    def num_exact_at_most(self) -> int:
        """Tokens whose keys and values are those of full depth once all are computed."""
        if self.request.copies_kv:
            return len(self.request.prompt_token_ids)
        return self.num_tokens

    @property
    def num_reusable_at_most(self) -> int:
        """Tokens, from the first on, that it need not compute where others did.

        The output at its last token gives the next one; the output before a prompt token that is
        still to be scored gives that token's log-probability.
        """
        request = self.request
        first = request.first_position_with_logprobs
        if first is not None and first + len(request.scored) < len(request.prompt_token_ids):
            return first + len(request.scored) - 1
        return min(self.num_tokens - 1, self.num_exact_at_most)

    @property
    def num_tokens_at_once(self) -> int:
        """Tokens after the computed ones that one step may compute.

        Where keys and values are copied, rows that skipped layers are computed again as they were
        at first: those together that left at one layer.
        """
        start = self.num_computed_tokens
        if start < self.num_exact_at_most:
            return self.num_exact_at_most - start
        layers = [self.layer_left_at(position) for position in range(start, self.num_tokens)]
        return next((i for i, layer in enumerate(layers) if layer != layers[0]), len(layers))

    def layer_left_at(self, position: int) -> int | None:
        """The layer whose head chose the token after an output token; None while there is none."""
        index = position + 1 - len(self.request.prompt_token_ids)
        return self.exit_layers[index] if index < len(self.exit_layers) else None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED


@dataclass(eq=False, slots=True)
class Request:
    """What a caller asked for, and how far it has come.

    Attributes:
        request_id: unique among the living requests.
        prompt_token_ids: at least one token.
        sampling: how tokens are chosen.
        decoding: which heads give the distribution.
        depth: number of layers that its mode runs.
        seed: of its random numbers: the given one, or one that the engine drew.
        eos_token_ids: the model's ending tokens, none when the request ignores them.
        bad_words: what must not be generated, as token ids.
        grammar: the beginning of its text, where its form is given.
        prompt: the text, if a text was given.
        source_token_ids: what an encoder reads; the prompt is then what the decoder begins with.
            Empty for a decoder-only model.
        forced_bos_token_id: what the first output token has to be, if anything.
        forced_eos_token_id: what the last one has to be when the output grows to its full length.
        max_output_tokens: that length.
        continuation: what follows the prompt whatever is chosen, for as long as it reaches.
        score_from: for a scoring request, the first position whose token is scored (>= 1); None
            for a generating one. A scoring request ends with its prefill.
        sequences: one until the prompt is computed, then one for each of ``n`` or of the beams.
        scored: prompt tokens scored so far, from ``first_position_with_logprobs`` on.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        admitted_at: when it first ran, in seconds of ``time.perf_counter``.
        error: why it failed, if it did.
        copies_kv: whether rows of its output leave keys and values that are not of full depth.
        prefix_salt: what keys and values depend on besides the tokens before them.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    decoding: DecodingMode
    depth: int
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    prompt: str | None = None
    source_token_ids: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    max_output_tokens: int | None = None
    continuation: tuple[int, ...] = ()
    score_from: int | None = None
    sequences: list[Sequence] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    num_cached_tokens: int = 0
    admitted_at: float | None = None
    error: str | None = None
    copies_kv: bool = field(init=False)
    prefix_salt: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.copies_kv = isinstance(self.decoding, EarlyExit) and self.decoding.kv == "copy"
        self.prefix_salt = array("q", self.source_token_ids).tobytes()

    @property
    def width(self) -> int:
        """Sequences that it occupies at once after its prompt."""
        return max(self.sampling.n, self.sampling.num_beams)

    def forced_token_id(self, num_output_tokens: int) -> int | None:
        """What has to follow so many output tokens, None when the model may choose."""
        if self.forced_eos_token_id is not None and num_output_tokens + 1 == self.max_output_tokens:
            return self.forced_eos_token_id
        return self.forced_bos_token_id if num_output_tokens == 0 else None

    @property
    def given_token_ids(self) -> list[int]:
        """The tokens that the caller gave: the source where there is one, else the prompt."""
        return list(self.source_token_ids) or self.prompt_token_ids

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Every token that ends the text."""
        return tuple(dict.fromkeys((*self.eos_token_ids, *self.sampling.stop_token_ids)))

    @property
    def is_beam_search(self) -> bool:
        return self.sampling.num_beams > 1

    @property
    def first_position_with_logprobs(self) -> int | None:
        """First prompt position whose token needs a log-probability, None when none does."""
        if self.score_from is not None:
            return self.score_from
        return 1 if self.sampling.prompt_logprobs is not None else None

    @property
    def is_finished(self) -> bool:
        return bool(self.sequences) and all(s.is_finished for s in self.sequences)


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one of a request's ``n`` continuations; the first one has the request's own."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63
