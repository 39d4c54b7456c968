"""Checks what a caller gives and makes requests of it: errors before work.

Knows the model's limits and the tokenizer; nothing of the requests that already run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from multiexit_engine.checkpoint.calibration import read_calibrations
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.grammar import Grammar, GrammarCompiler
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.params import DecodingMode, EarlyExit, SamplingParams, SelfSpeculative
from multiexit_engine.request import Request

Prompt: TypeAlias = str | Sequence[int]


class Intake:
    """Makes checked requests for one engine.

    Attributes:
        grammars: compiles the forms of structured outputs; any thread may use it.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        model: MultiExitModel,
        tokenizer: Any | None,
        default_mode: DecodingMode,
        folder: Path | None = None,
    ) -> None:
        self._engine_config = engine_config
        self._model_config = model.config
        self._heads = model.heads
        self._tokenizer: Any = tokenizer
        self._default_mode = default_mode
        self._folder = folder
        self.grammars = GrammarCompiler(
            tokenizer, model.config.vocab_size, model.config.eos_token_ids
        )
        self.depth_of(default_mode)

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        decoding: DecodingMode | None,
        seed: int,
    ) -> Request:
        """A generating request; raises ValueError naming what is wrong and what is allowed."""
        if not isinstance(sampling, SamplingParams):
            raise ValueError(f"sampling={sampling!r}: must be SamplingParams")
        mode, depth = self.mode_and_depth(decoding)
        token_ids = self.token_ids(prompt)
        source: list[int] = []
        if self._model_config.encoder is not None:
            source, token_ids = self.checked_source(token_ids), self._decoder_prompt()
        limit = self._engine_config.max_model_len
        if len(token_ids) >= limit:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens: with room for one new token it may have "
                f"{limit - 1} (max_model_len={limit}); shorten it"
            )
        self._check_sampling(sampling)
        if source and sampling.prompt_logprobs is not None:
            raise ValueError(
                f"prompt_logprobs={sampling.prompt_logprobs}: must be None, since the encoder "
                "reads the prompt and gives its tokens no probability"
            )
        if sampling.num_beams > 1 and isinstance(mode, SelfSpeculative):
            raise ValueError(
                f"num_beams={sampling.num_beams}: SelfSpeculative drafts one continuation; use "
                f"decoding={mode.target!r} for beam search"
            )
        if sampling.num_beams > 1 and isinstance(mode, EarlyExit):
            raise ValueError(
                f"num_beams={sampling.num_beams}: scores of beams that left at different exits "
                "cannot be compared; use decoding=Original() or Exit(...) for beam search"
            )
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            decoding=mode,
            depth=depth,
            seed=seed if sampling.seed is None else sampling.seed,
            eos_token_ids=() if sampling.ignore_eos else self._model_config.eos_token_ids,
            bad_words=self._bad_words(sampling),
            grammar=self._grammar(sampling),
            prompt=prompt if isinstance(prompt, str) else None,
            source_token_ids=tuple(source),
            forced_bos_token_id=self._forced("bos", sampling),
            forced_eos_token_id=self._forced("eos", sampling),
            max_output_tokens=min(sampling.max_new_tokens, limit - len(token_ids)),
        )

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are sources, which an encoder reads."""
        return self._model_config.encoder is not None

    def checked_source(self, token_ids: list[int], name: str = "prompt") -> list[int]:
        """The tokens themselves; raises ValueError when the encoder cannot read so many."""
        assert self._model_config.encoder is not None
        limit = self._model_config.encoder.max_source_len
        if len(token_ids) > limit:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens: the encoder of this model reads {limit}; "
                "shorten it"
            )
        return token_ids

    def target(self, token_ids: list[int], name: str) -> list[int]:
        """What the decoder reads to give the probabilities of a target, which must fit."""
        limit = self._engine_config.max_model_len
        whole = self._decoder_prompt() + token_ids
        if len(whole) > limit:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens: behind the decoder's start token it may have "
                f"{limit - 1} (max_model_len={limit}); shorten it"
            )
        return whole

    def _decoder_prompt(self) -> list[int]:
        encoder = self._model_config.encoder
        assert encoder is not None and encoder.decoder_start_token_id is not None
        return [encoder.decoder_start_token_id]

    def _forced(self, end: Literal["bos", "eos"], sampling: SamplingParams) -> int | None:
        name = f"forced_{end}_token_id"
        asked: int | None = getattr(sampling, name)
        if asked is not None or (end == "eos" and sampling.ignore_eos):
            return asked
        own: int | None = getattr(self._model_config, name)
        return own

    def _grammar(self, sampling: SamplingParams) -> Grammar | None:
        if sampling.structured_outputs is None:
            return None
        bos, eos = self._forced("bos", sampling), self._forced("eos", sampling)
        for name, token in (("forced_bos_token_id", bos), ("forced_eos_token_id", eos)):
            if token is not None:
                raise ValueError(
                    f"structured_outputs: {name}={token}, of the request or of the model, writes "
                    "a token that no form allows for"
                )
        return self.grammars.grammar(sampling.structured_outputs)

    def scoring_request(
        self,
        request_id: str,
        token_ids: list[int],
        score_from: int,
        decoding: DecodingMode | None,
        source: Sequence[int] = (),
    ) -> Request:
        """A request that only scores ``token_ids[score_from:]``, which must fit the model."""
        mode, depth = self.mode_and_depth(decoding)
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=SamplingParams(max_new_tokens=1),
            decoding=mode,
            depth=depth,
            seed=0,
            score_from=score_from,
            source_token_ids=tuple(source),
        )

    def reading_request(
        self, request_id: str, prompt: Prompt, decoding: DecodingMode | None
    ) -> Request:
        """A request that reads one text; raises ValueError where that is too long, or no prompt."""
        if self.has_encoder:
            raise ValueError("this reads one text: give score() a (source, target) tuple instead")
        token_ids, limit = self.token_ids(prompt), self._engine_config.max_model_len
        if len(token_ids) > limit:
            raise ValueError(f"prompt has {len(token_ids)} tokens: the model reads {limit}")
        return self.scoring_request(request_id, token_ids, 1, decoding)

    def depth_of(self, mode: DecodingMode) -> int:
        """Layers that a mode runs; loads its heads, raises ValueError if the model lacks them."""
        if not isinstance(mode, get_args(DecodingMode)):
            allowed = ", ".join(cls.__name__ for cls in get_args(DecodingMode))
            raise ValueError(f"decoding={mode!r}: must be one of {allowed}")
        resolved = resolve_mode(mode, self._model_config)
        for head in resolved.heads:
            self._heads.require(head)
        if isinstance(mode, EarlyExit) and mode.measure == "probe":
            exits = (head.layer for head in resolved.exits)
            self._heads.probes.require(exits, "EarlyExit.measure='probe'")
        return resolved.depth

    def mode_and_depth(self, decoding: DecodingMode | None) -> tuple[DecodingMode, int]:
        """A request's mode, with a threshold where it asks for a calibrated one."""
        mode = self._default_mode if decoding is None else decoding
        depth = self.depth_of(mode)
        if isinstance(mode, EarlyExit) and mode.calibrated is not None:
            mode = self._with_threshold(mode)
        return mode, depth

    def _with_threshold(self, mode: EarlyExit) -> EarlyExit:
        layers = tuple(head.layer for head in resolve_mode(mode, self._model_config).exits)
        probes = self._heads.probes.digest if mode.measure == "probe" else None
        found = [] if self._folder is None else read_calibrations(self._folder)
        for item in found:
            if item.fits(mode, layers, probes):
                return replace(mode, threshold=item.threshold, calibrated=None)
        known = "; ".join(
            f"{item.agreement} for {item.measure} at layers {list(item.layers)}"
            + (f" with shortlist={item.shortlist}" if item.shortlist else "")
            + (" with kv='copy'" if item.kv == "copy" else "")
            + (" of other probes" if item.probes not in (None, probes) else "")
            for item in found
        )
        raise ValueError(
            f"EarlyExit.calibrated={mode.calibrated}: no threshold was found for {mode.measure} at "
            f"layers {list(layers)} with shortlist={mode.shortlist} and kv={mode.kv!r}; run "
            "`multiexit calibrate`. "
            f"Beside the model there are: {known or 'none'}"
        )

    def token_ids(self, prompt: Prompt, name: str = "prompt") -> list[int]:
        """The tokens of a prompt: at least one, all in the vocabulary."""
        token_ids = self.encode(prompt, name)
        if not token_ids:
            raise ValueError(f"{name} is empty: give at least one token")
        return token_ids

    def encode(self, text: Prompt, name: str = "prompt") -> list[int]:
        """As ``token_ids``, but nothing may come of an empty text."""
        if isinstance(text, str):
            return self._encoded_text(text, name)
        token_ids = _integers(text)
        if token_ids is None:
            raise ValueError(f"{name}={_shown(text)}: must be a string or a list of token ids")
        vocab_size = self._model_config.vocab_size
        for place, token in enumerate(token_ids):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name}[{place}]={token}: token ids of this model are 0..{vocab_size - 1}"
                )
        return token_ids

    def _encoded_text(self, text: str, name: str) -> list[int]:
        if self._tokenizer is None:
            raise ValueError(
                f"{name} is text, but the checkpoint has no tokenizer: give token ids, or put "
                "the tokenizer's files into the checkpoint's folder"
            )
        token_ids = list(self._tokenizer(text)["input_ids"])
        self._check_model_has(token_ids, name)
        return token_ids

    def _check_model_has(self, token_ids: list[int], name: str) -> None:
        """Tokens may have been added to a tokenizer whose model was never resized."""
        vocab_size = self._model_config.vocab_size
        if (token := max(token_ids, default=0)) >= vocab_size:
            raise ValueError(
                f"{name} has the token {self._tokenizer.convert_ids_to_tokens(token)!r} of the "
                f"tokenizer, {token}, but the model's are 0..{vocab_size - 1}: leave it out, or "
                "give a model whose embeddings were resized for it"
            )

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if sampling.stop and self._tokenizer is None:
            raise ValueError(
                "stop needs text, but the checkpoint has no tokenizer: use stop_token_ids"
            )
        vocab_size = self._model_config.vocab_size
        given = {
            "forced_bos_token_id": _given(sampling.forced_bos_token_id),
            "forced_eos_token_id": _given(sampling.forced_eos_token_id),
            "stop_token_ids": sampling.stop_token_ids,
            "logit_bias": tuple(sampling.logit_bias or ()),
            "bad_words": tuple(t for w in sampling.bad_words if not isinstance(w, str) for t in w),
        }
        for name, tokens in given.items():
            for token in tokens:
                if token >= vocab_size:
                    raise ValueError(
                        f"{name}: token {token} is not one of this model's 0..{vocab_size - 1}"
                    )

    def _bad_words(self, sampling: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Every bad word as token ids; a string counts with and without a space before it."""
        words: list[tuple[int, ...]] = []
        for word in sampling.bad_words:
            if not isinstance(word, str):
                words.append(word)
            elif self._tokenizer is None:
                raise ValueError(
                    f"bad_words={word!r} is text, but the checkpoint has no tokenizer: give its "
                    "token ids"
                )
            else:
                words += self._forms(word)
        return tuple(dict.fromkeys(words))

    def _forms(self, word: str) -> list[tuple[int, ...]]:
        bare, name = word.lstrip(" "), f"bad_words={word!r}"
        forms = []
        for form in (bare, " " + bare):
            ids = list(self._tokenizer(form, add_special_tokens=False)["input_ids"])
            self._check_model_has(ids, name)
            forms += [tuple(ids)] if ids else []
        if not forms:
            raise ValueError(f"{name}: the tokenizer makes no token of it; give token ids")
        return forms


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of an argument that may be a single one."""
    if isinstance(prompts, str):
        return [prompts]
    if all(isinstance(part, int) for part in prompts):
        return [prompts] if prompts else [[]]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def one_for_each(value: Any, count: int, name: str) -> list[Any]:
    """A value for each of ``count`` prompts; raises ValueError for a list of another length."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} items for {count} prompts: give one or as many")
    return list(value)


def _given(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def _integers(value: object) -> list[int] | None:
    if not isinstance(value, Sequence):
        return None
    items: list[object] = list(value)
    found = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    return found if len(found) == len(items) else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
