"""What one request may choose: how its tokens are picked.

From which heads they come is its decoding mode, which ``multiexit_engine.modes`` defines and this
module shows too. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from multiexit_engine.checks import is_finite, is_int, reject
from multiexit_engine.mode_forms import decoding_from_json, decoding_to_json, parse_decoding
from multiexit_engine.modes import (
    MODES,
    Contrast,
    DecodingMode,
    DoLa,
    EarlyExit,
    Exit,
    Layer,
    Original,
    SelfSpeculative,
)
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.structured import StructuredOutputs, structured_outputs_from

__all__ = [
    "MODES",
    "Contrast",
    "DecodingMode",
    "DoLa",
    "EarlyExit",
    "Exit",
    "Layer",
    "Original",
    "Parallel",
    "SamplingParams",
    "SelfSpeculative",
    "StructuredOutputs",
    "decoding_from_json",
    "decoding_to_json",
    "parse_decoding",
]


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise reject(name, value, "a list")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and meaning as in transformers.

    Attributes:
        max_new_tokens: most tokens to generate.
        min_new_tokens: no ending token before this many.
        temperature: divides the scores before sampling; 0 takes the best token (greedy).
        top_k: sample among this many best tokens; 0 for all.
        top_p: sample among the fewest tokens that hold this much probability; 1 for all.
        min_p: drop tokens below this fraction of the best one's probability.
        typical_p: keep the tokens of most typical information content with this much mass; 1 off.
        repetition_penalty: divides positive and multiplies negative scores of tokens already in
            prompt or output; 1 off.
        presence_penalty: subtracted from the score of every token already in the output.
        frequency_penalty: the same, times how often it occurred.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and output; 0 off.
        logit_bias: added to the scores of these token ids.
        bad_words: sequences of token ids, or strings, that must not be generated.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: further tokens that end the text.
        forced_bos_token_id: the first token of every output; None for the checkpoint's, if any.
        forced_eos_token_id: the last token of an output that grows to its full length; None for the
            checkpoint's, if any, which ignore_eos switches off.
        ignore_eos: the model's ending tokens do not end the text.
        seed: of this request's random numbers; the same seed gives the same tokens in any batch.
        n: number of continuations; under beam search the n best of num_beams.
        num_beams: beam search with this many beams; needs temperature 0.
        length_penalty: exponent of the length that divides a beam's score.
        early_stopping: when beam search ends: True, False or "never" as in transformers.
        logprobs: report this many best alternatives for each token; -1 for the whole vocabulary.
        prompt_logprobs: the same for the tokens of the prompt.
        confidences: report for each token of ``EarlyExit`` what its exit measured. False spares
            the whole head at each exit where 8-bit codes of it can decide who leaves.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the form of the text, such as {"regex": "[ab]+"} or
            {"json": {...a schema...}}: tokens that would break it are never chosen, and the text
            ends where it is whole. Under a limit of tokens it may end before.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    confidences: bool = True
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_counts()
        self._check_numbers()
        self._check_token_lists()
        self._check_together()

    def _normalise(self) -> None:
        """Accept a single string or any list where a tuple is stored."""
        words = _as_tuple("bad_words", self.bad_words)
        words = tuple(w if isinstance(w, str) else _as_tuple("bad_words", w) for w in words)
        object.__setattr__(self, "bad_words", words)
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        elif self.logit_bias is not None:
            raise reject("logit_bias", self.logit_bias, "None or {token id: finite number}")
        given = self.structured_outputs
        if given is not None and not isinstance(given, StructuredOutputs):
            object.__setattr__(self, "structured_outputs", structured_outputs_from(given))

    def _check_counts(self) -> None:
        least = {
            "max_new_tokens": 1,
            "min_new_tokens": 0,
            "top_k": 0,
            "no_repeat_ngram_size": 0,
            "n": 1,
            "num_beams": 1,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if not is_int(value) or value < smallest:
                raise reject(name, value, f"an integer, {smallest} or more")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or value < -1):
                raise reject(name, value, "None, a count, or -1 for the whole vocabulary")
        if self.seed is not None and (not is_int(self.seed) or not 0 <= self.seed < 2**63):
            raise reject("seed", self.seed, "None or an integer in [0, 2**63)")

    def _check_numbers(self) -> None:
        ranges: dict[str, tuple[Callable[[float], bool], str]] = {
            "temperature": (lambda x: x >= 0, "a finite number, 0 (greedy) or more"),
            "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
            "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
            "typical_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
            "repetition_penalty": (lambda x: x > 0, "a finite number above 0"),
            "presence_penalty": (lambda _: True, "a finite number"),
            "frequency_penalty": (lambda _: True, "a finite number"),
            "length_penalty": (lambda _: True, "a finite number"),
        }
        for name, (is_allowed, allowed) in ranges.items():
            value = getattr(self, name)
            if not is_finite(value) or not is_allowed(value):
                raise reject(name, value, allowed)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise reject("early_stopping", self.early_stopping, "True, False or 'never'")
        for name in ("ignore_eos", "skip_special_tokens", "confidences"):
            if not isinstance(getattr(self, name), bool):
                raise reject(name, getattr(self, name), "True or False")

    def _check_token_lists(self) -> None:
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or value < 0):
                raise reject(name, value, "None or a token id, 0 or more")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise reject("stop", text, "non-empty strings")
        for token in self.stop_token_ids:
            if not is_int(token) or token < 0:
                raise reject("stop_token_ids", token, "token ids, 0 or more")
        for word in self.bad_words:
            ids = () if isinstance(word, str) else word
            if not word or any(not is_int(token) or token < 0 for token in ids):
                raise reject("bad_words", word, "non-empty strings or lists of token ids")
        for token, bias in (self.logit_bias or {}).items():
            if not is_int(token) or token < 0 or not is_finite(bias):
                raise reject("logit_bias", {token: bias}, "{token id: finite number}")

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: must not exceed "
                f"max_new_tokens={self.max_new_tokens}"
            )
        if self.structured_outputs is not None:
            self._check_with_structure()
        if self.num_beams > 1:
            if self.temperature > 0:
                raise reject("temperature", self.temperature, "0 under beam search (num_beams>1)")
            if self.n > self.num_beams:
                raise reject("n", self.n, f"at most num_beams={self.num_beams} under beam search")
            if self.stop:
                raise reject("stop", self.stop, "empty under beam search; use stop_token_ids")
            if self.logprobs is not None:
                raise reject("logprobs", self.logprobs, "None under beam search: beams have scores")
        elif self.temperature == 0 and self.n > 1:
            raise reject("n", self.n, "1 when temperature=0: greedy continuations are all equal")

    def _check_with_structure(self) -> None:
        if self.num_beams > 1:
            raise reject("num_beams", self.num_beams, "1 with structured_outputs")
        if self.ignore_eos:
            raise reject(
                "ignore_eos", True, "False with structured_outputs: the form ends the text"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0
