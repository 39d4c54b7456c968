"""From a body's fields to what the engine takes: ``SamplingParams`` and a decoding mode."""

from __future__ import annotations

from typing import Any

from multiexit_engine.mode_forms import decoding_from_json
from multiexit_engine.modes import DecodingMode
from multiexit_engine.params import SamplingParams
from multiexit_engine.serve.errors import ApiError
from multiexit_engine.serve.protocol import SamplingBody

# OpenAI's defaults where they differ from those of SamplingParams.
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 0}
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


def sampling_params(body: SamplingBody, **changes: Any) -> SamplingParams:
    """The parameters of a body; ``changes`` win. Raises ApiError naming what is wrong."""
    given = {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
    if body.min_tokens is not None:
        given["min_new_tokens"] = body.min_tokens
    if body.logit_bias is not None:
        given["logit_bias"] = _token_biases(body.logit_bias)
    if (body.num_beams or 1) > 1:
        given.setdefault("temperature", 0.0)
    try:
        return SamplingParams(**DEFAULTS | given | changes)
    except ValueError as error:
        raise ApiError(400, _renamed(str(error))) from error


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
