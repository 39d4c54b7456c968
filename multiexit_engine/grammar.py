"""Which tokens may come next in a text of a given form, by llguidance.

Knows tokens as bytes; nothing of scores, sequences or of how a token is chosen.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from multiexit_engine.structured import StructuredOutputs

INSTALL = "pip install 'multiexit-engine[structured]'"
NUM_KEPT = 64  # compiled grammars; one of a small schema takes tens of kilobytes
MAX_REASON_CHARS = 300


class Grammar:
    """How far a text has come in its grammar.

    Attributes:
        is_complete: the text has ended, or is whole and nothing can follow it.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why no text can follow any more; empty while one can."""
        return _first_lines(self._matcher.get_error()) if self._matcher.is_error() else ""

    def fork(self) -> Grammar:
        """The same place of the same grammar, to go another way from."""
        return Grammar(self._matcher.deep_copy())

    def advance(self, token_id: int) -> None:
        """Take the next token of the text; it must have been an allowed one."""
        self._matcher.consume_token(token_id)

    def allowed(self, drafts: Sequence[int] = ()) -> bytes | None:
        """The tokens that may follow the text and some drafts: bit t % 8 of byte t // 8 is token t.

        None when the drafts end the text or break the grammar: then it does not matter what
        follows. The text itself stays where it is.
        """
        matcher = self._matcher
        if drafts:
            matcher = matcher.deep_copy()
            if matcher.try_consume_tokens(list(drafts)) < len(drafts) or matcher.is_stopped():
                return None
        mask: bytes = matcher.compute_bitmask()
        return mask


class GrammarCompiler:
    """Makes grammars for the tokens of one model; any thread may call it.

    Args:
        tokenizer: a fast one of transformers, or None.
        vocab_size: of the model.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self, tokenizer: Any | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokens: Any | None = None
        self._compiled: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()

    def grammar(self, wanted: StructuredOutputs) -> Grammar:
        """The beginning of a text of this form; compiled once while it is among the latest.

        Raises:
            ValueError: the form is not what it should be, the tokenizer cannot be used, or
                llguidance is not installed.
        """
        with self._lock:
            found = self._compiled.get(wanted)
            if found is not None:
                self._compiled.move_to_end(wanted)
                return found.fork()
            tokens = self._llguidance_tokens()
        compiled = _compiled(wanted, tokens)
        with self._lock:
            self._compiled[wanted] = compiled
            if len(self._compiled) > NUM_KEPT:
                self._compiled.popitem(last=False)
            return compiled.fork()

    def _llguidance_tokens(self) -> Any:
        if self._tokens is None:
            tokenizer = self._usable_tokenizer()
            try:
                from llguidance import hf
            except ModuleNotFoundError as error:
                raise ValueError(
                    f"structured_outputs needs the package 'llguidance': {INSTALL}"
                ) from error
            self._tokens = hf.from_tokenizer(
                tokenizer,
                n_vocab=max(self._vocab_size, len(tokenizer)),
                eos_token=self._eos_token_ids,
            )
        return self._tokens

    def _usable_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise ValueError(
                "structured_outputs needs text, but the checkpoint has no tokenizer: put the "
                "tokenizer's files into the checkpoint's folder"
            )
        if not getattr(self._tokenizer, "is_fast", False):
            raise ValueError(
                f"structured_outputs: {type(self._tokenizer).__name__} cannot be used; it needs a "
                "fast tokenizer (tokenizer.json)"
            )
        if not self._eos_token_ids:
            raise ValueError(
                "structured_outputs: the model has no token that ends a text; name one as "
                "eos_token_id in its config.json"
            )
        return self._tokenizer


def _compiled(wanted: StructuredOutputs, tokens: Any) -> Grammar:
    from llguidance import LLMatcher, LLParserLimits

    # without the grammar and the parser's state in its messages
    limits = LLParserLimits(verbose_errors=False)
    name, grammar = _llguidance_grammar(wanted)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(f"structured_outputs.{name}: {_first_lines(matcher.get_error())}")
    return Grammar(matcher)


def _llguidance_grammar(wanted: StructuredOutputs) -> tuple[str, str]:
    """The name of the given field, and its value in llguidance's own form."""
    from llguidance import grammar_from

    if wanted.json is not None:
        return "json", _json_grammar(str(wanted.json))
    if wanted.json_object:
        return "json_object", _json_grammar('{"type": "object"}')
    if wanted.regex is not None:
        return "regex", grammar_from("regex", wanted.regex)
    if wanted.choice is not None:
        return "choice", grammar_from("choice", json.dumps(list(wanted.choice)))
    assert wanted.grammar is not None, "StructuredOutputs has exactly one field"
    try:
        return "grammar", grammar_from("grammar", wanted.grammar)
    except ValueError as error:
        raise ValueError(f"structured_outputs.grammar: {error}") from error


def _json_grammar(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def _first_lines(message: str) -> str:
    text = " ".join(message.split("<state>")[0].split())
    return text if len(text) <= MAX_REASON_CHARS else text[:MAX_REASON_CHARS] + "..."
