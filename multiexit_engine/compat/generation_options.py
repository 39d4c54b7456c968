"""transformers' generation options as SamplingParams: what ``generate(**options)`` means here.

Priorities are transformers' own: an option of the call, then the GenerationConfig of the call,
then the checkpoint's, then the library's defaults. Every option either works or is refused by
name. Knows nothing of models; of prompts only their padded length.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from multiexit_engine.params import DoLa, SamplingParams

_DEFAULTS: dict[str, Any] = {
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "dola_layers": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "return_dict_in_generate": False,
    # keys and values are always cached; recomputing them would only be slower
    "use_cache": True,
}
_OPTIONS = (*_DEFAULTS, "seed")
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_DEFAULT_NEW_TOKENS = 20

# values of other transformers options that change nothing
_NEUTRAL: dict[str, Any] = {
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
# IBM's checkpoints carry output_hidden_states=True, which their own generate() trips over
_IGNORED_IN_CHECKPOINTS = (
    "output_hidden_states",
    "output_attentions",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The options of one ``generate`` call after all defaults were applied.

    Attributes:
        values: one value for every supported transformers option.
        seed: of the call's random numbers; None draws one from torch's global generator.
    """

    values: Mapping[str, Any]
    seed: int | None = None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return _token_ids(self.values["eos_token_id"])

    @property
    def bos_token_id(self) -> int | None:
        ids = _token_ids(self.values["bos_token_id"])
        return ids[0] if ids else None

    @property
    def given_pad_token_id(self) -> int | None:
        ids = _token_ids(self.values["pad_token_id"])
        return ids[0] if ids else None

    @property
    def pad_token_id(self) -> int | None:
        """The padding token; as in transformers the first ending token when there is none."""
        ids = _token_ids(self.values["pad_token_id"]) or self.eos_token_ids
        return ids[0] if ids else None

    @property
    def returns_dict(self) -> bool:
        return bool(self.values["return_dict_in_generate"])

    @property
    def num_return_sequences(self) -> int:
        return int(self.values["num_return_sequences"] or 1)

    @property
    def dola(self) -> DoLa | None:
        """The mode that ``dola_layers`` asks for: transformers 4.55's, each row on its own."""
        layers = self.values["dola_layers"]
        return None if layers is None else DoLa(layers, jsd="reference")

    def sampling(self, padded_len: int, longest: int, seed: int) -> SamplingParams:
        """SamplingParams of a row of a batch that is ``padded_len`` tokens wide.

        Args:
            padded_len: width of ``input_ids``; transformers counts padding as length.
            longest: most tokens of prompt and output together that the model can hold.
            seed: of this row.
        """
        value = self.values
        max_new_tokens = self._max_new_tokens(padded_len, longest)
        min_new_tokens = value["min_new_tokens"]
        if min_new_tokens is None:
            min_new_tokens = max(0, (value["min_length"] or 0) - padded_len)
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(min_new_tokens, max_new_tokens),
            repetition_penalty=_or_default(value["repetition_penalty"], 1.0),
            no_repeat_ngram_size=value["no_repeat_ngram_size"] or 0,
            bad_words=self._bad_words(),
            stop_token_ids=self.eos_token_ids,
            ignore_eos=True,
            seed=seed,
            n=self.num_return_sequences,
            num_beams=value["num_beams"] or 1,
            length_penalty=_or_default(value["length_penalty"], 1.0),
            early_stopping=value["early_stopping"] or False,
            **self._warping(),
        )

    def _max_new_tokens(self, padded_len: int, longest: int) -> int:
        if (given := self.values["max_new_tokens"]) is not None:
            return int(given)
        if (total := self.values["max_length"]) is None:
            return max(1, min(_DEFAULT_NEW_TOKENS, longest - padded_len))
        if total <= padded_len:
            raise ValueError(
                f"max_length={total}: input_ids already hold {padded_len} tokens; raise max_length "
                f"or give max_new_tokens"
            )
        return int(total) - padded_len

    def _warping(self) -> dict[str, Any]:
        value = self.values
        if not value["do_sample"]:
            return {"temperature": 0.0}
        temperature = _or_default(value["temperature"], 1.0)
        if not temperature > 0:
            raise ValueError(
                f"temperature={temperature}: must be above 0 with do_sample=True; "
                f"for the most likely tokens give do_sample=False"
            )
        return {
            "temperature": float(temperature),
            "top_k": value["top_k"] or 0,
            "top_p": _or_default(value["top_p"], 1.0),
            "min_p": _or_default(value["min_p"], 0.0),
            "typical_p": _or_default(value["typical_p"], 1.0),
        }

    def _bad_words(self) -> tuple[tuple[int, ...], ...]:
        """The forbidden sequences; as in transformers an ending token cannot be forbidden."""
        words = (tuple(word) for word in self.values["bad_words_ids"] or ())
        return tuple(w for w in words if not (len(w) == 1 and w[0] in self.eos_token_ids))


def resolve_options(
    checkpoint: GenerationConfig, given: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationOptions:
    """What a call of ``generate`` asks for.

    Args:
        checkpoint: the model's own generation config.
        given: the call's ``generation_config``.
        options: the call's further keyword arguments.

    Raises:
        TypeError: an option that transformers does not know either.
        ValueError: a transformers option that this engine does not offer, or a contradiction.
    """
    known = vars(GenerationConfig()).keys()  # type: ignore[no-untyped-call]
    if unknown := sorted(options.keys() - known - {"seed"}):
        raise TypeError(f"generate() got an unknown option {unknown[0]!r}: {_supported()}")
    own = {k: v for k, v in _set_values(checkpoint).items() if k not in _IGNORED_IN_CHECKPOINTS}
    call = {**(_set_values(given) if given is not None else {}), **options}
    for name, value in {**own, **call}.items():
        if name not in _OPTIONS and not _is_off(name, value):
            raise ValueError(f"{name}={value!r}: generate() does not offer {name}; {_supported()}")
    values = {**_DEFAULTS, **own, **call}
    seed = values.pop("seed", None)
    _check_together(values, call)
    return GenerationOptions(values, seed)


def _check_together(values: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    num_beams = values["num_beams"] or 1
    count = values["num_return_sequences"] or 1
    if values["do_sample"] and num_beams > 1:
        raise ValueError(
            f"do_sample=True with num_beams={num_beams}: beam search does not sample here; "
            f"give do_sample=False or num_beams=1"
        )
    if count > 1 and not values["do_sample"] and num_beams < count:
        raise ValueError(
            f"num_return_sequences={count}: needs do_sample=True or num_beams of at least {count}"
        )
    ignored = [name for name in _SAMPLING_ONLY if call.get(name) not in (None, _DEFAULTS[name])]
    if ignored and not values["do_sample"]:
        warnings.warn(
            f"{', '.join(ignored)}: no effect without do_sample=True (as in transformers)",
            UserWarning,
            stacklevel=4,
        )


def _set_values(config: GenerationConfig) -> dict[str, Any]:
    """What a config sets, without its private attributes and its version."""
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }


def _is_off(name: str, value: Any) -> bool:
    return value is None or value is False or (name in _NEUTRAL and value == _NEUTRAL[name])


def _or_default(value: Any, default: float) -> Any:
    return default if value is None else value


def _token_ids(value: int | Sequence[int] | Any | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return (value,) if isinstance(value, int) else tuple(value)


def _supported() -> str:
    return "supported are " + ", ".join(_OPTIONS)
