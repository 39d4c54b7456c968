"""The mode of each row of vLLM's batch, followed through vLLM's interface for logits processors.

Changes no logits: the model asks for the modes when it computes them. Knows nothing of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from multiexit_engine.compat.vllm.request_modes import OfferedMode, check_mode, requested_mode
from multiexit_engine.config import ModelConfig

# By the model's settings, which a model and its batch share: vLLM hands a model nothing of its
# requests. A batch is made before its model and replaces what stood under a number used again.
_modes_of: dict[int, dict[int, OfferedMode]] = {}


class RowModes(LogitsProcessor):  # type: ignore[misc]
    """Follows which request stands in which row.

    Args:
        vllm_config: of the engine.
        device: unused, as is the next; vLLM gives all three.
        is_pin_memory: see above.

    Attributes:
        model: in the process that takes requests, the shape of the model made last.
    """

    model: ClassVar[ModelConfig | None] = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._modes: dict[int, OfferedMode] = {}
        _modes_of[id(vllm_config.model_config)] = self._modes

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called by vLLM for each request, before it is queued.

        Raises:
            ValueError: its ``decoding`` is no mode that is offered, or it asks for what the model
                cannot give.
        """
        mode = requested_mode(sampling_params.extra_args)
        if cls.model is not None:
            check_mode(mode, cls.model)
        if sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: multi-exit models inside vLLM have none")

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that came, left or moved."""
        process_dict_updates(self._modes, batch_update, _mode)

    def apply(self, logits: Tensor) -> Tensor:
        """``logits`` as they are: the modes were at work when they were computed."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Whether greedy requests can do without ``apply``."""
        return True


def modes_of(vllm_config: VllmConfig) -> Mapping[int, OfferedMode]:
    """Row to mode, kept up to date while the batch changes."""
    return _modes_of[id(vllm_config.model_config)]


def _mode(params: SamplingParams, prompt: Any, output: Any) -> OfferedMode:
    return requested_mode(params.extra_args)
