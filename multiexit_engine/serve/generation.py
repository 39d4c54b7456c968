"""Runs one HTTP request's prompts and answers with all of them, whole or as a stream.

Knows submissions and forms; nothing of what a body looks like.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from multiexit_engine.errors import EngineError, RequestFailed
from multiexit_engine.modes import DecodingMode
from multiexit_engine.outputs import CompletionOutput, RequestOutput
from multiexit_engine.params import SamplingParams
from multiexit_engine.runtime.requests.submission import Submission
from multiexit_engine.serve.answers import Form, Usage, without_tokens
from multiexit_engine.serve.connection import (
    EventEnvelope,
    EventStream,
    event,
    to_json,
    unless_gone,
)
from multiexit_engine.serve.errors import ApiError, as_api_error, error_json
from multiexit_engine.serve.protocol import SamplingBody
from multiexit_engine.serve.server_state import state_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP request asks of the engine.

    Attributes:
        prompts: their tokens.
        sampling: of all of them.
        mode: of all of them; None for the engine's own.
        num_returned: choices of each prompt, at most ``sampling.n``: the best ones.
        is_prompt_only: the client asked for no token; the one that the engine makes is not shown.
    """

    prompts: Sequence[list[int]]
    sampling: SamplingParams
    mode: DecodingMode | None
    num_returned: int
    is_prompt_only: bool = False

    def shown(self, outputs: list[CompletionOutput]) -> list[CompletionOutput]:
        """What the client gets to see of a request's completions."""
        return [without_tokens(output) for output in outputs] if self.is_prompt_only else outputs


def check_stream(body: SamplingBody) -> bool:
    """Whether a body asks for a stream; raises ApiError for options without one."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only together with stream=true", "stream_options")
    if body.stream and (body.num_beams or 1) > 1:
        raise ApiError(400, "num_beams: beam search cannot be streamed", "num_beams")
    return bool(body.stream)


async def answer(
    request: Request, body: SamplingBody, job: Job, form: Form, prefix: str
) -> Response:
    """Run a job and answer in a form. Raises ApiError before anything has been sent."""
    state = state_of(request)
    is_streamed = check_stream(body)
    head = {
        "id": f"{prefix}-{request.state.request_id}",
        "object": form.kind_of_chunks if is_streamed else form.kind,
        "created": int(time.time()),
        "model": state.model_name,
    }
    usage = request.state.usage = Usage()
    try:
        submission = await state.engine.submit(
            job.prompts, job.sampling, job.mode, streamed=is_streamed
        )
    except (ValueError, EngineError) as error:
        raise as_api_error(error) from error
    if state.settings.log_prompts:
        texts = [await state.texts.decode(prompt) for prompt in job.prompts]
        fields = {"request_id": request.state.request_id, "prompts": texts}
        logger.info("prompts", extra={"fields": fields})
    if is_streamed:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(submission, job, form, head, usage, wants_usage)
        return EventStream(submission, events)
    with submission:
        outputs = await unless_gone(request.receive, submission.outputs(job.prompts))
    return Response(to_json(_whole(outputs, job, form, head, usage)), media_type="application/json")


def _whole(
    outputs: list[RequestOutput], job: Job, form: Form, head: dict[str, Any], usage: Usage
) -> dict[str, Any]:
    choices = []
    for place, output in enumerate(outputs):
        if output.error is not None:
            raise as_api_error(RequestFailed(output.error))
        usage.add_prompt(output)
        completions = job.shown(output.outputs)
        for completion in completions:
            usage.add_output(completion)
        for rank, completion in enumerate(_best(completions, job.num_returned)):
            index = place * job.num_returned + rank
            choices.append(form.choice(index, place, completion, output))
    return head | {"choices": choices, "usage": usage.json()}


def _best(outputs: list[CompletionOutput], count: int) -> list[CompletionOutput]:
    """The completions whose tokens are likeliest on average, if there are more than asked for."""
    if len(outputs) <= count:
        return outputs
    return sorted(
        outputs,
        key=lambda one: (one.cumulative_logprob or 0.0) / max(len(one.token_ids), 1),
        reverse=True,
    )[:count]


async def _events(
    submission: Submission,
    job: Job,
    form: Form,
    head: dict[str, Any],
    usage: Usage,
    wants_usage: bool,
) -> AsyncIterator[bytes]:
    """All events of a stream; an error after its beginning is an event, too."""
    seen: set[int] = set()
    envelope = EventEnvelope(head, "choices", {"usage": None} if wants_usage else {})
    try:
        async for mail in submission:
            bodies = []
            for place, piece in mail:
                if piece.outputs and place not in seen:
                    seen.add(place)
                    usage.add_prompt(piece)
                for output in job.shown(piece.outputs):
                    usage.add_output(output)
                    index = place * job.num_returned + output.index
                    choice = form.chunk(index, place, output, piece)
                    bodies.append(envelope.event([choice]))
                if piece.error is not None:
                    raise RequestFailed(piece.error)
            if bodies:
                yield b"".join(bodies)
        if wants_usage:
            yield event(head | {"choices": [], "usage": usage.json()})
    except Exception as error:
        if not isinstance(error, RequestFailed):
            logger.exception("a stream failed")
        yield event(error_json(as_api_error(error)))
    yield b"data: [DONE]\n\n"
