"""Turns a growing list of tokens into text, without ever showing half a character.

Also finds stop strings. Knows one sequence at a time, and nothing of scheduling.
"""

from __future__ import annotations

from typing import Protocol

# Tokens of the prompt that are decoded in front of the output: enough that a tokenizer which
# treats the start of a text specially (a dropped leading space) sees the output in its middle.
CONTEXT_TOKENS = 5
REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer; transformers' have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """The text of one sequence's output, token by token.

    A piece of text is given out when no later token can change it: not inside a UTF-8 character,
    and not where a stop string may have begun.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._skip_special_tokens = skip_special_tokens
        self._token_ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._context_start = 0
        self._decoded_until = len(self._token_ids)
        self._num_given = 0
        self.text = ""
        self.stop_string: str | None = None

    def append(self, token_id: int, *, may_stop: bool = True) -> None:
        """Add a token; afterwards ``stop_string`` is set if one was completed by it.

        The text is then cut before the stop string. With ``may_stop`` False stop strings that end
        in this token are ignored.
        """
        self._token_ids.append(token_id)
        known = self._decode(self._context_start, self._decoded_until)
        whole = self._decode(self._context_start, len(self._token_ids))
        if len(whole) <= len(known) or whole.endswith(REPLACEMENT):
            return
        self._context_start, self._decoded_until = self._decoded_until, len(self._token_ids)
        self._extend(whole[len(known) :], may_stop)

    def append_unseen(self, token_ids: list[int]) -> None:
        """Add tokens whose text nobody looks at before ``finish``: no stop strings, no stream."""
        self._token_ids += token_ids

    def finish(self) -> None:
        """Give out what was held back, an incomplete character included (as U+FFFD)."""
        if self.stop_string is None:
            known = self._decode(self._context_start, self._decoded_until)
            whole = self._decode(self._context_start, len(self._token_ids))
            self._decoded_until = len(self._token_ids)
            self._extend(whole[len(known) :], may_stop=False)
        self._stop = ()

    def take(self) -> str:
        """The text that became certain since the last call."""
        end = len(self.text) - self._length_of_possible_stop()
        piece = self.text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def _decode(self, start: int, end: int) -> str:
        ids = self._token_ids[start:end]
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _extend(self, piece: str, may_stop: bool) -> None:
        searched_from = len(self.text)
        self.text += piece
        if not may_stop:
            return
        found = [
            (place, stop)
            for stop in self._stop
            if (place := self.text.find(stop, max(0, searched_from - len(stop) + 1))) >= 0
        ]
        if found:
            place, self.stop_string = min(found)
            self.text = self.text[:place]
            self._stop = ()

    def _length_of_possible_stop(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
