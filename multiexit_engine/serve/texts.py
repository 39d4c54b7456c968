"""The server's own tokenizer: texts to tokens and back, outside the event loop and the engine.

A fast tokenizer must not be used by two threads at once, so this one is a copy that lives in a
thread of its own.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from multiexit_engine.serve.errors import ApiError
from multiexit_engine.serve.protocol import Message, TextPart

_Result = TypeVar("_Result")
NO_TOKENIZER = (
    "the model has no tokenizer: give token ids, or put its files into the model's folder"
)


class Texts:
    """Encodes and decodes for the server.

    Args:
        tokenizer: of the engine, or None.
        chat_template: instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any | None, chat_template: str | None = None) -> None:
        own: Any = copy.deepcopy(tokenizer)
        self._tokenizer = own
        if chat_template is not None and self._tokenizer is not None:
            self._tokenizer.chat_template = chat_template
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of texts. Raises ApiError without a tokenizer."""
        return await self._run(
            lambda: [
                list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
                for text in texts
            ]
        )

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to where the assistant speaks; ApiError without a template."""
        if self._tokenizer is not None and self._tokenizer.chat_template is None:
            raise ApiError(
                400,
                "the model's tokenizer has no chat template: use /v1/completions, or start the "
                "server with --chat-template FILE",
                param="messages",
            )
        chat = [
            message.model_dump(exclude_none=True) | {"content": _text(message.content)}
            for message in messages
        ]
        return await self._run(lambda: self._encode_chat(chat))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return await self._run(lambda: str(self._tokenizer.decode(list(token_ids))))

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return await self._run(lambda: [str(self._tokenizer.decode([t])) for t in token_ids])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    def _encode_chat(self, chat: list[dict[str, Any]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ApiError(
                400, f"the chat template refuses these messages: {error}", "messages"
            ) from error
        # the template wrote the special tokens itself
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        if self._tokenizer is None:
            raise ApiError(400, NO_TOKENIZER)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
