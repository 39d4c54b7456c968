"""The bodies that clients may send: every field here works, every other one is refused by name.

Types and ranges only; what a model allows is checked by the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _encodable(text: str) -> str:
    """Refuse half of a surrogate pair: JSON can say it, but no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text is not valid Unicode: a lone surrogate stands in it") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

# Fields of OpenAI's that clients are likely to try, and why they are not taken.
UNSUPPORTED = {
    "suffix": "not supported: the models continue text, they do not fill it in",
    "tools": "not supported: the server calls no tools; response_format gives answers in JSON",
    "tool_choice": "not supported: the server calls no tools",
    "functions": "not supported: the server calls no functions; response_format gives JSON",
    "function_call": "not supported: the server calls no functions",
    "parallel_tool_calls": "not supported: the server calls no tools",
    "modalities": "not supported: text only",
    "audio": "not supported: text only",
    "prediction": "not supported; choose a faster mode with decoding",
    "reasoning_effort": "not supported: the models do not reason in a separate channel",
    "store": "not supported: the server stores nothing",
    "metadata": "not supported: the server stores nothing",
    "service_tier": "not supported: there is one tier",
    "web_search_options": "not supported: the server searches nothing",
}


class Body(BaseModel):
    """Base of all bodies: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream holds beside the text."""

    include_usage: bool = False


class PlainText(Body):
    """An answer of any form."""

    type: Literal["text"]


class JsonObject(Body):
    """An answer that is some JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema as OpenAI wraps it. It is always followed strictly."""

    name: Text
    schema_: dict[Text, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class JsonSchema(Body):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class Structure(Body):
    """The form of an answer in vLLM's words; exactly one of the fields."""

    json_: dict[Text, Any] | Text | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=10_000)] | None = None
    grammar: Text | None = None


class SamplingBody(Body):
    """What completions and chats share; null means the default.

    OpenAI's names and defaults, and beside them those of ``SamplingParams``.
    """

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Text, Annotated[float, Field(ge=-100, le=100)]] | None = None

    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    bad_words: Annotated[list[Text | list[TokenId]], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    num_beams: Annotated[int, Field(ge=1, le=128)] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None

    response_format: (
        Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None
    ) = Field(None, description="The form of the answer, as OpenAI writes it.")
    structured_outputs: Structure | None = Field(
        None, description="The form of the answer, as vLLM writes it."
    )
    guided_json: dict[Text, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=10_000)] | None = None
    guided_grammar: Text | None = None

    decoding: dict[str, Any] | None = Field(
        None, description='Mode of this request, such as {"mode": "exit", "layer": 6}.'
    )
    return_exits: bool | None = Field(
        None, description="Tell for each token which layer chose it, as exit_layers."
    )


class CompletionRequest(SamplingBody):
    """Body of ``/v1/completions``."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart]
    name: Text | None = None


class ChatRequest(SamplingBody):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None


class TokenizeRequest(Body):
    """Body of ``/tokenize``: a text, or the messages of a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Body of ``/detokenize``."""

    model: Text | None = None
    tokens: list[TokenId]


BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
