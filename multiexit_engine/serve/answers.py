"""What clients get back: OpenAI's JSON forms of completions and chats, whole or in pieces.

Knows outputs; nothing of engines, HTTP or of how a stream is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from multiexit_engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    RequestPiece,
)

# Fields of CompletionOutput with one item for each token, which return_exits adds to a choice.
TELEMETRY = ("exit_layers", "drafted")
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say

Piece: TypeAlias = RequestPiece | RequestOutput


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add_prompt(self, piece: Piece) -> None:
        self.prompt_tokens += len(piece.prompt_token_ids)
        self.cached_tokens += piece.num_cached_tokens

    def add_output(self, output: CompletionOutput) -> None:
        self.completion_tokens += len(output.token_ids)

    def json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Form(Protocol):
    """How an endpoint writes choices. ``place`` tells the prompt, ``index`` the choice."""

    @property
    def kind(self) -> str:
        """The ``object`` of whole answers."""

    @property
    def kind_of_chunks(self) -> str:
        """The ``object`` of a stream's events."""

    def choice(self, index: int, place: int, output: CompletionOutput, of: Piece) -> dict[str, Any]:
        """A whole choice, ``of`` a request's output."""

    def chunk(self, index: int, place: int, output: CompletionOutput, of: Piece) -> dict[str, Any]:
        """What a stream adds to a choice."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that stands before its completion: its text, and that of each of its tokens."""

    text: str
    tokens: Sequence[str] = ()


@dataclass(slots=True)
class CompletionForm:
    """Choices of ``/v1/completions``.

    Attributes:
        with_logprobs: add the log-probabilities that the outputs hold.
        return_exits: add the fields of TELEMETRY.
        echoes: for each prompt what stands before its completions; empty without echo.
    """

    with_logprobs: bool
    return_exits: bool
    echoes: Sequence[Echo] = ()
    kind: str = "text_completion"
    kind_of_chunks: str = "text_completion"
    _num_chars: dict[int, int] = field(default_factory=dict)

    def choice(self, index: int, place: int, output: CompletionOutput, of: Piece) -> dict[str, Any]:
        echo = self.echoes[place] if self.echoes and index not in self._num_chars else None
        self._num_chars.setdefault(index, 0)
        return {
            "index": index,
            "text": (echo.text if echo else "") + output.text,
            "logprobs": self._logprobs(index, output, echo, of),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        } | _telemetry(output, self.return_exits)

    chunk = choice

    def _logprobs(
        self, index: int, output: CompletionOutput, echo: Echo | None, of: Piece
    ) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        found: list[dict[int, Logprob] | None] = [*(output.logprobs or [])]
        token_ids, tokens = output.token_ids, _texts(output)
        if echo is not None and of.prompt_logprobs is not None:
            found = [*of.prompt_logprobs, *found]
            token_ids, tokens = of.prompt_token_ids + token_ids, [*echo.tokens, *tokens]
        offsets = []
        for text in tokens:
            offsets.append(self._num_chars[index])
            self._num_chars[index] += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [
                at and _finite(at[token]) for token, at in zip(token_ids, found, strict=True)
            ],
            "top_logprobs": [at and _top(at) for at in found],
            "text_offset": offsets,
        }


@dataclass(slots=True)
class ChatForm:
    """Choices of ``/v1/chat/completions``.

    Attributes:
        num_top: alternatives to list for each token; None for no log-probabilities.
        return_exits: add the fields of TELEMETRY.
    """

    num_top: int | None
    return_exits: bool
    kind: str = "chat.completion"
    kind_of_chunks: str = "chat.completion.chunk"
    _begun: set[int] = field(default_factory=set)

    def choice(self, index: int, place: int, output: CompletionOutput, of: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message} | self._rest(output)

    def chunk(self, index: int, place: int, output: CompletionOutput, of: Piece) -> dict[str, Any]:
        delta = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        return {"index": index, "delta": delta | {"content": output.text}} | self._rest(output)

    def _rest(self, output: CompletionOutput) -> dict[str, Any]:
        return {
            "logprobs": self._logprobs(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        } | _telemetry(output, self.return_exits)

    def _logprobs(self, output: CompletionOutput) -> dict[str, Any] | None:
        if self.num_top is None:
            return None
        content = []
        for token, at in zip(output.token_ids, output.logprobs or [], strict=True):
            best = sorted(at.values(), key=lambda found: found.rank)[: self.num_top]
            content.append(_with_bytes(at[token]) | {"top_logprobs": [*map(_with_bytes, best)]})
        return {"content": content, "refusal": None}


def without_tokens(output: CompletionOutput) -> CompletionOutput:
    """A completion of nothing, for those who want the prompt alone."""
    lists: dict[str, Any] = {"token_ids": [], "logprobs": []} | {name: [] for name in TELEMETRY}
    return replace(output, text="", finish_reason=FinishReason.LENGTH, stop_reason=None, **lists)


def _telemetry(output: CompletionOutput, wanted: bool) -> dict[str, Any]:
    return {name: getattr(output, name) for name in TELEMETRY} if wanted else {}


def _texts(output: CompletionOutput) -> list[str]:
    found = output.logprobs or []
    return [at[t].decoded_token or "" for t, at in zip(output.token_ids, found, strict=True)]


def _finite(found: Logprob) -> float:
    return max(found.logprob, LEAST_LOGPROB)


def _top(at: dict[int, Logprob]) -> dict[str, float]:
    """The best tokens and the token itself; of tokens with the same text the best one."""
    best: dict[str, float] = {}
    for found in sorted(at.values(), key=lambda found: found.rank):
        best.setdefault(found.decoded_token or "", _finite(found))
    return best


def _with_bytes(found: Logprob) -> dict[str, Any]:
    text = found.decoded_token or ""
    # a token that is part of a character has no text of its own
    is_whole = "\ufffd" not in text
    return {
        "token": text,
        "logprob": _finite(found),
        "bytes": list(text.encode()) if is_whole else None,
    }
