"""Texts of a few tokens in a microsecond, for streams, which ask for them at every token.

Knows transformers' tokenizers, whose own checks take five times as long.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class BackendDecoder:
    """``decode`` of a tokenizer without what transformers puts around it."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of some tokens."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


def text_decoder(tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """What decodes as the tokenizer does: its backend, where transformers adds nothing to that."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    kind = type(tokenizer)
    is_plain = all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name)
        for name in ("decode", "_decode")
    )
    if not is_plain or tokenizer.clean_up_tokenization_spaces:
        return tokenizer
    return BackendDecoder(tokenizer.backend_tokenizer)
