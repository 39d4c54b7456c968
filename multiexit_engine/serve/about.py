"""What a server tells of itself and of its tokens: models, health, version, tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from multiexit_engine.modes import MODES
from multiexit_engine.serve.errors import ApiError
from multiexit_engine.serve.protocol import DetokenizeRequest, TokenizeRequest
from multiexit_engine.serve.server_state import ServerState, state_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Whether the server takes requests; status 503 while it shuts down."""
    if not state_of(request).engine.is_accepting:
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    return {"status": "ok"}


@router.get("/version")
async def version(request: Request) -> dict[str, str]:
    """Version of the package."""
    return {"version": str(request.app.version)}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model, with its exits and limits."""
    return {"object": "list", "data": [_model(state_of(request))]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """The one model, by its name."""
    state = state_of(request)
    state.check_model(name)
    return _model(state)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a text or of a chat."""
    state = state_of(request)
    state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt, messages: give one of them", "prompt")
    if body.messages is not None:
        if body.add_special_tokens is not None:
            raise ApiError(
                400, "add_special_tokens: the chat template writes them", "add_special_tokens"
            )
        tokens = await state.texts.encode_chat(body.messages)
    else:
        special = body.add_special_tokens is not False
        (tokens,) = await state.texts.encode([body.prompt or ""], add_special_tokens=special)
    answer: dict[str, Any] = {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": state.engine.config.max_model_len,
    }
    if body.return_token_strs:
        answer["token_strs"] = await state.texts.token_strings(tokens)
    return answer


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids."""
    state = state_of(request)
    state.check_model(body.model)
    size = state.engine.model_config.vocab_size
    for place, token in enumerate(body.tokens):
        if token >= size:
            raise ApiError(
                400, f"tokens[{place}]={token}: token ids of this model are 0..{size - 1}", "tokens"
            )
    return {"prompt": await state.texts.decode(body.tokens)}


def _model(state: ServerState) -> dict[str, Any]:
    config = state.engine.model_config
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "multiexit_engine",
        "max_model_len": state.engine.config.max_model_len,
        "num_layers": config.num_layers,
        "exit_layers": list(config.exit_layers),
        "decoding_modes": list(MODES),
    }
