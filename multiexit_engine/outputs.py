"""What a caller gets back: texts, tokens and scores. Plain data, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

# Sizes of plausible sets that are told apart; no vocabulary is larger than the last one.
CANDIDATE_BOUNDS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000, 2**31)


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's place in the distribution of its mode, before penalties and temperature."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: which of the request's ``n`` continuations, best first under beam search.
        text: decoded output, without the prompt, stop strings or ending tokens.
        token_ids: every generated token, an ending token included.
        logprobs: for each token the requested alternatives and the token itself, best first; None
            when ``SamplingParams.logprobs`` is None.
        cumulative_logprob: sum of the tokens' log-probabilities; under beam search the sequence's
            length-penalised score. None when neither was asked for.
        finish_reason: None while the request still runs.
        stop_reason: the stop string or stop token that ended it, if one did (None for EOS).
        exit_layers: for each token the 1-based layer whose head (the upper one under contrast)
            chose it.
        drafted: for each token whether an exit had drafted it (``SelfSpeculative``); tokens are
            the target's own either way.
        confidences: under ``EarlyExit`` for each token what was measured where it left; of one
            that left at no exit what the last exit measured. Empty otherwise, and with
            ``SamplingParams(confidences=False)``.
        premature_layers: under ``DoLa`` for each token the layer that it was contrasted with, 0
            for the embeddings. Empty otherwise, and under beam search.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    exit_layers: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    premature_layers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of a request: final from ``generate``, growing from ``step``.

    Attributes:
        request_id: the engine's or the caller's name of the request.
        prompt: the text that was given, None for token ids.
        prompt_token_ids: tokens of the prompt.
        outputs: one item for each of the ``n`` continuations.
        prompt_logprobs: for each prompt token its alternatives (None for the first one); None
            when ``SamplingParams.prompt_logprobs`` is None.
        finished: nothing will be added.
        num_cached_tokens: prompt tokens whose keys and values came from the prefix cache.
        error: what went wrong when the finish reason is ``error``.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestPiece:
    """What one step added to a request; the pieces of a request add up to its output.

    Attributes:
        request_id: the engine's or the caller's name of the request.
        prompt_token_ids: tokens of the prompt; the engine's own list, not to be changed.
        outputs: continuations that gained something; ``text``, ``token_ids``, ``logprobs`` and
            ``exit_layers`` hold only what is new. The text of a request that is not streamed comes
            with its last piece.
        prompt_logprobs: as in ``RequestOutput``, with the first piece only.
        finished: this is the last piece.
        num_cached_tokens: prompt tokens whose keys and values came from the prefix cache.
        admitted_at: when the request first ran, in seconds of ``time.perf_counter``; None for one
            that ended while it waited.
        error: what went wrong when the finish reason is ``error``.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    admitted_at: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Log-probabilities of a given text.

    Attributes:
        token_ids: the scored tokens (of the continuation, or of the whole text).
        token_logprobs: natural log-probability of each; None for a token with nothing before it.
        is_greedy: whether each token is the mode's first choice at its place.
        total: sum of the log-probabilities that are not None.
    """

    token_ids: list[int]
    token_logprobs: list[float | None]
    is_greedy: list[bool]
    total: float


@dataclass(frozen=True, slots=True)
class FollowedText:
    """What a mode would have written in the place of a given text's tokens.

    Attributes:
        token_ids: its choice at each place, the text's own tokens standing before it.
        exit_layers: the layer that made each choice.
    """

    token_ids: list[int]
    exit_layers: list[int]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine was made, and how full it is now.

    Attributes:
        num_running: sequences that hold KV blocks.
        num_waiting: sequences that wait for their turn.
        num_steps: steps run.
        num_generated_tokens: tokens chosen.
        num_drafted_tokens: drafts that were checked, other tokens for their places included.
        num_accepted_tokens: those that were right.
        num_tokens_by_layer: tokens chosen by the layer whose head (the upper one under contrast)
            chose them.
        num_preemptions: sequences that lost their blocks and were computed again.
        num_kv_blocks: blocks of the pool.
        num_free_kv_blocks: those that nobody holds; they may still serve as prefix cache.
        prefix_query_tokens: prompt tokens looked up in the prefix cache.
        prefix_hit_tokens: those found there.
        rows_per_layer: under ``Parallel`` for each decoder layer the positions that ran it.
        keyed_rows_per_layer: those of which it made keys and values, exited ones included.
        tested_rows_per_layer: those that its head was asked about, to see whether they leave.
        contrasts_by_candidates: distributions that were contrasted to choose a token, by how many
            tokens were plausible: up to each of CANDIDATE_BOUNDS and more than the one before it.
        num_candidates: plausible tokens of all of them together.
    """

    num_running: int
    num_waiting: int
    num_steps: int
    num_generated_tokens: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_tokens_by_layer: dict[int, int]
    num_preemptions: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    rows_per_layer: tuple[int, ...] = ()
    keyed_rows_per_layer: tuple[int, ...] = ()
    tested_rows_per_layer: tuple[int, ...] = ()
    contrasts_by_candidates: tuple[int, ...] = ()
    num_candidates: int = 0


def join_completions(pieces: Sequence[CompletionOutput]) -> CompletionOutput:
    """The completion that pieces of one index, in their order, add up to."""
    last = pieces[-1]
    lists: dict[str, Any] = {
        f.name: [item for piece in pieces for item in getattr(piece, f.name)]
        for f in fields(last)
        if isinstance(getattr(last, f.name), list)
    }
    return replace(last, text="".join(piece.text for piece in pieces), **lists)


def join_pieces(pieces: Sequence[RequestPiece], prompt: str | None = None) -> RequestOutput:
    """The output that all pieces of a request add up to."""
    parts: dict[int, list[CompletionOutput]] = {}
    for piece in pieces:
        for part in piece.outputs:
            parts.setdefault(part.index, []).append(part)
    last = pieces[-1]
    return RequestOutput(
        request_id=last.request_id,
        prompt=prompt,
        prompt_token_ids=list(last.prompt_token_ids),
        outputs=[join_completions(parts[index]) for index in sorted(parts)],
        prompt_logprobs=next((p.prompt_logprobs for p in pieces if p.prompt_logprobs), None),
        finished=last.finished,
        num_cached_tokens=last.num_cached_tokens,
        error=last.error,
    )
