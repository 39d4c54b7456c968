"""Makes the caller's outputs of a request: texts, tokens, log-probabilities."""

from __future__ import annotations

from multiexit_engine.outputs import (
    CompletionOutput,
    FollowedText,
    Logprob,
    RequestOutput,
    RequestPiece,
)
from multiexit_engine.request import ChosenToken, Request, ScoredToken, Sequence
from multiexit_engine.runtime.requests.core_protocol import Core


def request_output(core: Core, request: Request) -> RequestOutput:
    """The state of a request, its texts included."""
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=list(request.given_token_ids),
        outputs=[_completion(core, s, 0, _whole_text(core, s)) for s in request.sequences],
        prompt_logprobs=_prompt_logprobs(core, request),
        finished=request.is_finished,
        num_cached_tokens=request.num_cached_tokens,
        error=request.error,
    )


def request_piece(
    core: Core, request: Request, outputs: list[CompletionOutput], *, with_prompt: bool
) -> RequestPiece:
    """What a step added to a request, ``outputs`` being what it added to its completions."""
    return RequestPiece(
        request_id=request.request_id,
        prompt_token_ids=request.given_token_ids,
        outputs=outputs,
        prompt_logprobs=_prompt_logprobs(core, request) if with_prompt else None,
        finished=request.is_finished,
        num_cached_tokens=request.num_cached_tokens,
        admitted_at=request.admitted_at,
        error=request.error,
    )


def followed_text(request: Request) -> FollowedText:
    """What was chosen where a text went on as it was given."""
    (sequence,) = request.sequences
    chosen = [token.token_id for token in sequence.chosen]
    return FollowedText(chosen, list(sequence.exit_layers))


def completion_piece(core: Core, sequence: Sequence, start: int) -> CompletionOutput:
    """A completion from its output token ``start`` on, with the text that became certain."""
    is_shown = sequence.is_finished or sequence.request.request_id in core.streamed
    return _completion(core, sequence, start, _text_piece(core, sequence) if is_shown else "")


def _text_piece(core: Core, sequence: Sequence) -> str:
    """The text that became certain since the last call; all of the rest once it is finished."""
    text = core.text(sequence)
    if text is None:
        return ""
    if sequence.is_finished:
        text.finish()
    return text.take()


def _whole_text(core: Core, sequence: Sequence) -> str:
    text = core.text(sequence)
    if text is None:
        return ""
    if sequence.is_finished:
        text.finish()
    return text.text


def _completion(core: Core, sequence: Sequence, start: int, text: str) -> CompletionOutput:
    request = sequence.request
    has_score = request.sampling.logprobs is not None or request.is_beam_search
    return CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=sequence.token_ids[len(request.prompt_token_ids) + start :],
        logprobs=_logprobs(core, sequence, start),
        cumulative_logprob=sequence.cumulative_logprob if has_score else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        exit_layers=sequence.exit_layers[start:],
        drafted=sequence.drafted[start:],
        confidences=sequence.confidences[start:],
        premature_layers=[
            token.premature_layer
            for token in sequence.chosen[start:]
            if token.premature_layer is not None
        ],
    )


def _logprobs(core: Core, sequence: Sequence, start: int) -> list[dict[int, Logprob]] | None:
    if sequence.request.sampling.logprobs is None:
        return None
    return [_alternatives(core, token) for token in sequence.chosen[start:]]


def _prompt_logprobs(core: Core, request: Request) -> list[dict[int, Logprob] | None] | None:
    if request.sampling.prompt_logprobs is None:
        return None
    return [None, *(_alternatives(core, token) for token in request.scored)]


def _alternatives(core: Core, token: ChosenToken | ScoredToken) -> dict[int, Logprob]:
    found = {
        token_id: Logprob(logprob, rank, _decoded(core, token_id))
        for rank, (token_id, logprob) in enumerate(token.alternatives, 1)
    }
    if token.token_id not in found and token.logprob is not None and token.rank is not None:
        found[token.token_id] = Logprob(token.logprob, token.rank, _decoded(core, token.token_id))
    return found


def _decoded(core: Core, token_id: int) -> str | None:
    return None if core.tokenizer is None else core.tokenizer.decode([token_id])
