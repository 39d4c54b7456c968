"""What one request may choose: how tokens are picked, and from which heads.

Values are checked here as far as they can be without a model; what a model allows is checked by
``decoding.plan``. Knows nothing of tensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Layer: TypeAlias = int | Literal["original"]


def _reject(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name}={value!r}: must be {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # an integer of 400 digits is finite, but no float can hold it
    return abs(value) <= sys.float_info.max


@dataclass(frozen=True, slots=True)
class Original:
    """The model's own head on its last layer. Exact: plain decoding."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The head of one exit; deeper layers are not run. Exact: the checkpoint's exit.

    Attributes:
        layer: 1-based layer of the exit.
    """

    layer: int

    def __post_init__(self) -> None:
        if not _is_int(self.layer) or self.layer < 1:
            raise _reject("Exit.layer", self.layer, "a layer number, 1 or more")


@dataclass(frozen=True, slots=True)
class Contrast:
    """Auto-contrastive decoding: an upper exit corrected by what a lower one expects.

    Among the plausible tokens (``p_upper >= alpha * max p_upper``) mass is shared in proportion to
    ``p_upper / p_lower``; all other tokens keep ``p_upper``. Exact up to rounding, computed in
    float32 log space, never NaN.

    Attributes:
        upper: 1-based exit layer, or "original" for the model's own head.
        lower: 1-based exit layer. Equal to ``upper`` it makes the plausible tokens equally likely.
        alpha: plausibility threshold relative to the most likely token; 1 and more keeps only that
            token (and ties), 0 and less all tokens.
        min_candidates: the plausible set has at least this many tokens.
        function: replaces the formula: takes float32 logits of the upper and of the lower exit,
            both ``[1, 1, vocab]``, returns scores of that shape; called once for every position.
            It costs both heads in full; alpha and min_candidates are then its own affair.

    Source: Gera et al. 2023, arXiv:2305.01628; IBM's ``calculate_contrasted_logits``.
    """

    upper: Layer
    lower: int
    alpha: float = 0.1
    min_candidates: int = 1
    function: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.upper != "original" and (not _is_int(self.upper) or self.upper < 1):
            raise _reject("Contrast.upper", self.upper, "a layer number, 1 or more, or 'original'")
        if not _is_int(self.lower) or self.lower < 1:
            raise _reject("Contrast.lower", self.lower, "a layer number, 1 or more")
        if not _is_finite(self.alpha):
            raise _reject("Contrast.alpha", self.alpha, "a finite number, usually in (0, 1]")
        if not _is_int(self.min_candidates) or self.min_candidates < 0:
            raise _reject("Contrast.min_candidates", self.min_candidates, "0 (all tokens) or more")
        if self.function is not None and not callable(self.function):
            raise _reject("Contrast.function", self.function, "callable or None")


DecodingMode: TypeAlias = Original | Exit | Contrast
MODES: dict[str, type[Original] | type[Exit] | type[Contrast]] = {
    "original": Original,
    "exit": Exit,
    "contrast": Contrast,
}


def decoding_to_json(mode: DecodingMode) -> dict[str, Any]:
    """The JSON form of a mode: ``{"mode": "contrast", "upper": 24, "lower": 12, ...}``.

    Raises:
        ValueError: the mode holds a Python function.
    """
    name = next(name for name, cls in MODES.items() if isinstance(mode, cls))
    values = {f.name: getattr(mode, f.name) for f in fields(mode)}
    if values.pop("function", None) is not None:
        raise ValueError("Contrast.function: a Python function has no JSON form")
    return {"mode": name, **values}


def decoding_from_json(value: Mapping[str, Any]) -> DecodingMode:
    """The mode of a JSON form; raises ValueError naming any unknown or missing field."""
    if not isinstance(value, Mapping):
        raise _reject("decoding", value, 'an object such as {"mode": "exit", "layer": 6}')
    name = value.get("mode")
    if not isinstance(name, str) or name not in MODES:
        raise _reject("decoding.mode", name, "one of " + ", ".join(map(repr, MODES)))
    cls = MODES[name]
    known = {f.name: f for f in fields(cls) if f.name != "function"}
    given = {key: item for key, item in value.items() if key != "mode"}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"decoding mode {name!r} has no field {unknown[0]!r}: {_listed(known)}")
    required = {key for key, item in known.items() if item.default is MISSING}
    if missing := sorted(required - given.keys()):
        raise ValueError(f"decoding mode {name!r} needs the field {missing[0]!r}: {_listed(known)}")
    return cls(**given)


def parse_decoding(text: str) -> DecodingMode:
    """The mode of a command-line form such as ``contrast:24,12,alpha=0.1`` or ``exit:6``.

    Values without a name fill the fields in order. Raises ValueError as ``decoding_from_json``.
    """
    name, _, rest = text.strip().partition(":")
    if name not in MODES:
        raise _reject("decoding", text, "one of " + ", ".join(f"{mode}:..." for mode in MODES))
    names = [f.name for f in fields(MODES[name]) if f.name != "function"]
    value: dict[str, Any] = {"mode": name}
    for place, part in enumerate(part.strip() for part in rest.split(",") if part.strip()):
        key, equals, number = part.partition("=")
        if not equals:
            if place >= len(names):
                raise ValueError(f"decoding={text!r}: mode {name!r}: {_listed(names)}")
            key, number = names[place], part
        if (key := key.strip()) in value:
            raise ValueError(f"decoding={text!r}: {key!r} is given twice")
        value[key] = _number_or_word(number.strip())
    return decoding_from_json(value)


def _number_or_word(text: str) -> int | float | str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, int | float) else text


def _listed(names: Mapping[str, object] | list[str]) -> str:
    return "its fields are " + ", ".join(names) if names else "it has no fields"


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise _reject(name, value, "a list")
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
        ignore_eos: the model's ending tokens do not end the text.
        seed: of this request's random numbers; the same seed gives the same tokens in any batch.
        n: number of continuations; under beam search the n best of num_beams.
        num_beams: beam search with this many beams; needs temperature 0.
        length_penalty: exponent of the length that divides a beam's score.
        early_stopping: when beam search ends: True, False or "never" as in transformers.
        logprobs: report this many best alternatives for each token; -1 for the whole vocabulary.
        prompt_logprobs: the same for the tokens of the prompt.
        skip_special_tokens: leave special tokens out of the text.
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
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

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
            raise _reject("logit_bias", self.logit_bias, "None or {token id: finite number}")

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
            if not _is_int(value) or value < smallest:
                raise _reject(name, value, f"an integer, {smallest} or more")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < -1):
                raise _reject(name, value, "None, a count, or -1 for the whole vocabulary")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            raise _reject("seed", self.seed, "None or an integer in [0, 2**63)")

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
            if not _is_finite(value) or not is_allowed(value):
                raise _reject(name, value, allowed)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise _reject("early_stopping", self.early_stopping, "True, False or 'never'")
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _reject(name, getattr(self, name), "True or False")

    def _check_token_lists(self) -> None:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise _reject("stop", text, "non-empty strings")
        for token in self.stop_token_ids:
            if not _is_int(token) or token < 0:
                raise _reject("stop_token_ids", token, "token ids, 0 or more")
        for word in self.bad_words:
            ids = () if isinstance(word, str) else word
            if not word or any(not _is_int(token) or token < 0 for token in ids):
                raise _reject("bad_words", word, "non-empty strings or lists of token ids")
        for token, bias in (self.logit_bias or {}).items():
            if not _is_int(token) or token < 0 or not _is_finite(bias):
                raise _reject("logit_bias", {token: bias}, "{token id: finite number}")

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: must not exceed "
                f"max_new_tokens={self.max_new_tokens}"
            )
        if self.num_beams > 1:
            if self.temperature > 0:
                raise _reject("temperature", self.temperature, "0 under beam search (num_beams>1)")
            if self.n > self.num_beams:
                raise _reject("n", self.n, f"at most num_beams={self.num_beams} under beam search")
            if self.stop:
                raise _reject("stop", self.stop, "empty under beam search; use stop_token_ids")
            if self.logprobs is not None:
                raise _reject(
                    "logprobs", self.logprobs, "None under beam search: beams have scores"
                )
        elif self.temperature == 0 and self.n > 1:
            raise _reject("n", self.n, "1 when temperature=0: greedy continuations are all equal")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0
