"""``/v1/completions`` and ``/v1/chat/completions``: from bodies to jobs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from multiexit_engine.params import SamplingParams
from multiexit_engine.serve.answers import ChatForm, CompletionForm, Echo
from multiexit_engine.serve.errors import ApiError
from multiexit_engine.serve.generation import Job, answer
from multiexit_engine.serve.protocol import ChatRequest, CompletionRequest
from multiexit_engine.serve.sampling import decoding_mode, sampling_params
from multiexit_engine.serve.server_state import ServerState, state_of

DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several: texts or lists of token ids."""
    state = state_of(request)
    state.check_model(body.model)
    sampling, num_returned = _completion_params(body, state)
    mode = decoding_mode(body)
    prompts = await _prompts(body, state)
    form = CompletionForm(
        with_logprobs=body.logprobs is not None,
        return_exits=bool(body.return_exits),
        echoes=await _echoes(body, prompts, state) if body.echo else (),
    )
    job = Job(prompts, sampling, mode, num_returned, is_prompt_only=body.max_tokens == 0)
    return await answer(request, body, job, form, "cmpl")


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat, written down by the tokenizer's chat template."""
    state = state_of(request)
    state.check_model(body.model)
    num_top = _num_top(body, state)
    mode = decoding_mode(body)
    # checked before the template is run; the room that is left is known only afterwards
    sampling_params(body)
    prompt = await state.texts.encode_chat(body.messages)
    sampling = sampling_params(
        body, max_new_tokens=_answer_length(body, len(prompt), state), logprobs=num_top
    )
    form = ChatForm(num_top=num_top, return_exits=bool(body.return_exits))
    return await answer(request, body, Job([prompt], sampling, mode, sampling.n), form, "chatcmpl")


def _completion_params(body: CompletionRequest, state: ServerState) -> tuple[SamplingParams, int]:
    """The parameters, and how many choices of each prompt are returned."""
    wanted = body.n or 1
    tried = body.best_of or wanted
    if tried < wanted:
        raise ApiError(400, f"best_of={tried}: must be at least n={wanted}", "best_of")
    if tried > wanted and body.stream:
        raise ApiError(
            400, "best_of: the best ones are known only at the end, not in a stream", "best_of"
        )
    if tried > wanted and (body.num_beams or 1) > 1:
        raise ApiError(400, "best_of: num_beams returns the n best beams already", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens=0: only together with echo=true", "max_tokens")
    logprobs = body.logprobs
    if logprobs is not None:
        _check_top("logprobs", logprobs, state)
    if tried > wanted and logprobs is None:
        logprobs = 0
    default = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
    sampling = sampling_params(
        body,
        n=tried,
        max_new_tokens=default,
        logprobs=logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return sampling, wanted


async def _prompts(body: CompletionRequest, state: ServerState) -> list[list[int]]:
    given = body.prompt
    many = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not many:
        raise ApiError(400, "prompt is an empty list: give at least one prompt", "prompt")
    if len(many) > state.settings.max_prompts:
        raise ApiError(
            400,
            f"prompt has {len(many)} items: at most {state.settings.max_prompts} are allowed; "
            "send further requests",
            "prompt",
        )
    if isinstance(many[0], str):
        return await state.texts.encode([str(text) for text in many])
    return [list(ids) for ids in many]  # type: ignore[arg-type]


async def _echoes(
    body: CompletionRequest, prompts: list[list[int]], state: ServerState
) -> list[Echo]:
    echoes = []
    for place, ids in enumerate(prompts):
        if isinstance(body.prompt, str):
            text = body.prompt
        elif body.prompt and isinstance(body.prompt[place], str):
            text = str(body.prompt[place])
        else:
            text = await state.texts.decode(ids)
        tokens = [] if body.logprobs is None else await state.texts.token_strings(ids)
        echoes.append(Echo(text, tokens))
    return echoes


def _num_top(body: ChatRequest, state: ServerState) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only together with logprobs=true", "top_logprobs")
    if not body.logprobs:
        return None
    _check_top("top_logprobs", body.top_logprobs or 0, state)
    return body.top_logprobs or 0


def _check_top(name: str, count: int, state: ServerState) -> None:
    limit = state.settings.max_logprobs
    if count > limit:
        raise ApiError(400, f"{name}={count}: this server allows at most {limit}", name)


def _answer_length(body: ChatRequest, num_prompt: int, state: ServerState) -> int:
    """The wanted length of an answer, or all the room that is left."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens, max_completion_tokens: give one of them", "max_tokens")
    wanted = body.max_completion_tokens or body.max_tokens
    if wanted is not None:
        return wanted
    config = state.engine.config
    beams = body.num_beams or 1
    room = min(config.max_model_len, config.num_kv_blocks // beams * config.block_size)
    return max(room - num_prompt, body.min_tokens or 1)
