"""Checks requests for non-autoregressive answers: errors before work.

Knows the model's limits and the tokenizer; nothing of the requests that already run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.parallel import tested_layers
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.params import DecodingMode, Parallel, SamplingParams
from multiexit_engine.request import Request
from multiexit_engine.runtime.requests.intake import Intake, Prompt

# what has a meaning where every token is the most likely one of its place; all else must be as it
# is by default
_MEANINGFUL = {
    "max_new_tokens", "stop_token_ids", "ignore_eos", "seed", "skip_special_tokens", "logprobs",
    # these only shape a draw, and nothing is drawn at temperature 0
    "top_k", "top_p", "min_p", "typical_p", "length_penalty", "early_stopping",
    # of EarlyExit alone, whose confidences no other mode has
    "confidences",
}  # fmt: skip


class ParallelIntake(Intake):
    """Makes checked requests for an engine on a model with ELMER's decoder."""

    def __init__(
        self,
        engine_config: EngineConfig,
        model: ElmerModel,
        tokenizer: Any | None,
        default_mode: DecodingMode,
    ) -> None:
        self._elmer = model
        super().__init__(engine_config, model, tokenizer, default_mode)

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        decoding: DecodingMode | None,
        seed: int,
    ) -> Request:
        """A request for an answer; raises ValueError naming what is wrong and what is allowed."""
        if not isinstance(sampling, SamplingParams):
            raise ValueError(f"sampling={sampling!r}: must be SamplingParams")
        self._check_meaning(sampling)
        self._check_sampling(sampling)
        return self._request(request_id, prompt, sampling, decoding, seed)

    @property
    def has_encoder(self) -> bool:
        """No: here the one text that is given is all there is, so nothing has to be a pair."""
        return False

    def scoring_request(
        self,
        request_id: str,
        token_ids: list[int],
        score_from: int,
        decoding: DecodingMode | None,
        source: Sequence[int] = (),
    ) -> Request:
        """A request whose logits are asked for; its tokens are the source."""
        assert not source, "its tokens are the source"
        sampling = SamplingParams(ignore_eos=True)
        request = self._request(request_id, token_ids, sampling, decoding, 0)
        request.score_from = score_from
        return request

    def depth_of(self, mode: DecodingMode) -> int:
        """Layers that a mode may run; raises ValueError for one that this model cannot do."""
        last = self._elmer.config.num_layers
        if not isinstance(mode, Parallel):
            raise ValueError(
                f"decoding={mode!r}: this model's decoder finds all tokens at once, so it must be "
                "Parallel; open the checkpoint with architecture='bart' to write one token after "
                "the other"
            )
        if mode.exit == "soft" and not self._elmer.has_feedback:
            raise ValueError(
                "Parallel.exit='soft': the checkpoint has no concat_head.weight, which feeds "
                "predictions to the next layer; use 'none', 'confidence' or 'prescribed', or "
                "fine-tune it with soft exits"
            )
        if mode.layers is not None and max(mode.layers) > last:
            raise ValueError(
                f"Parallel.layers={mode.layers!r}: this model's decoder has the layers 1..{last}"
            )
        if mode.gate_chance is not None:
            self._elmer.gates.require(tested_layers(mode, last), "Parallel.gate_chance")
        if mode.collapse_repeats and self._tokenizer is None:
            raise ValueError(
                "Parallel.collapse_repeats=True needs words, but the checkpoint has no tokenizer"
            )
        return last

    def _request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        decoding: DecodingMode | None,
        seed: int,
    ) -> Request:
        mode = self._default_mode if decoding is None else decoding
        depth = self.depth_of(mode)
        assert isinstance(mode, Parallel), "depth_of allows nothing else"
        token_ids = self.token_ids(prompt)
        self._check_lengths(len(token_ids), mode, sampling)
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            decoding=mode,
            depth=depth,
            seed=seed if sampling.seed is None else sampling.seed,
            eos_token_ids=() if sampling.ignore_eos else self._model_config.eos_token_ids,
            prompt=prompt if isinstance(prompt, str) else None,
        )

    def _check_lengths(self, num_source: int, mode: Parallel, sampling: SamplingParams) -> None:
        limit = self._engine_config.max_model_len
        if num_source > limit:
            raise ValueError(f"prompt has {num_source} tokens: the model reads {limit}; shorten it")
        longest = mode.target_lens(num_source, sampling.max_new_tokens)[-1]
        if longest > limit:
            name = "max_new_tokens" if mode.length is None else "Parallel.length"
            raise ValueError(f"{name}: {longest} positions are asked for, the model has {limit}")

    def _check_meaning(self, sampling: SamplingParams) -> None:
        for field in fields(sampling):
            value = getattr(sampling, field.name)
            if field.name not in _MEANINGFUL and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r}: Parallel takes the most likely token at every place "
                    f"at once; leave {field.name} at {field.default!r}"
                )
        if sampling.logprobs not in (None, 0, 1):
            raise ValueError(
                f"logprobs={sampling.logprobs!r}: Parallel knows the log-probability of the token "
                "itself only; give 0, 1 or None"
            )
