"""From a body's fields to what the engine takes: ``SamplingParams`` and a decoding mode."""

from __future__ import annotations

from typing import Any

from multiexit_engine.mode_forms import decoding_from_json
from multiexit_engine.modes import DecodingMode
from multiexit_engine.params import SamplingParams
from multiexit_engine.serve.errors import ApiError
from multiexit_engine.serve.protocol import JsonObject, JsonSchema, SamplingBody
from multiexit_engine.structured import StructuredOutputs

# OpenAI's defaults where they differ from those of SamplingParams.
# answers carry no confidences
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "confidences": False}
SAME_NAME = (
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "skip_special_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
)

# what vLLM's older fields guided_json and so on are called after
GUIDED = ("json", "regex", "choice", "grammar")


def sampling_params(body: SamplingBody, **changes: Any) -> SamplingParams:
    """The parameters of a body; ``changes`` win. Raises ApiError naming what is wrong."""
    given = {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    if body.min_tokens is not None:
        given["min_new_tokens"] = body.min_tokens
    if body.logit_bias is not None:
        given["logit_bias"] = _token_biases(body.logit_bias)
    if (form := structured_outputs(body)) is not None:
        given["structured_outputs"] = form
    if (body.num_beams or 1) > 1:
        given.setdefault("temperature", 0.0)
    try:
        return SamplingParams(**DEFAULTS | given | changes)
    except ValueError as error:
        raise ApiError(400, _renamed(str(error))) from error


def structured_outputs(body: SamplingBody) -> StructuredOutputs | None:
    """The form that a body asks for, under whichever name. Raises ApiError."""
    forms = {name: form for name, form in _forms(body).items() if form is not None}
    if len(forms) > 1:
        raise ApiError(400, f"{', '.join(forms)}: give one of them", next(iter(forms)))
    for name, fields in forms.items():
        try:
            return StructuredOutputs(**fields)
        except ValueError as error:
            raise ApiError(400, str(error).replace("structured_outputs", name, 1), name) from error
    return None


def _forms(body: SamplingBody) -> dict[str, dict[str, Any] | None]:
    """What each of the names asks for, in the fields of StructuredOutputs."""
    given = body.structured_outputs
    fields = None if given is None else given.model_dump(by_alias=True, exclude_none=True)
    match body.response_format:
        case JsonObject():
            openai: dict[str, Any] | None = {"json_object": True}
        case JsonSchema(json_schema=named):
            openai = {"json": named.schema_}
        case _:
            openai = None
    guided = {kind: getattr(body, f"guided_{kind}") for kind in GUIDED}
    return {"response_format": openai, "structured_outputs": fields} | {
        f"guided_{kind}": None if value is None else {kind: value} for kind, value in guided.items()
    }


def decoding_mode(body: SamplingBody) -> DecodingMode | None:
    """The mode that a body asks for, None for the engine's own. Raises ApiError."""
    if body.decoding is None:
        return None
    try:
        return decoding_from_json(body.decoding)
    except ValueError as error:
        raise ApiError(400, str(error), param="decoding") from error


def _token_biases(given: dict[str, float]) -> dict[int, float]:
    wrong = next((key for key in given if not (key.isascii() and key.isdigit())), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias: {wrong[:40]!r} is no token id", param="logit_bias")
    return {int(key): bias for key, bias in given.items()}


def _renamed(message: str) -> str:
    """A message of SamplingParams in the words of the body."""
    return message.replace("max_new_tokens", "max_tokens").replace("min_new_tokens", "min_tokens")
