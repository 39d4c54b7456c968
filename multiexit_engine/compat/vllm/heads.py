"""The exits of a model inside vLLM: their weights, and logits by each row's own mode.

Knows nothing of the family beneath.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from multiexit_engine.checkpoint import exit_weight_name
from multiexit_engine.compat.vllm.request_modes import OfferedMode
from multiexit_engine.config import ModelConfig, VocabularyProjectionMode
from multiexit_engine.decoding.plan import ExitPlanner, HeadGroup
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.modes import DecodingMode, Original
from multiexit_engine.ops import contrast_logits

_ORIGINAL = Original()


class ExitWeights(nn.Module):
    """What the exits have of their own, under the names of the checkpoint.

    Args:
        config: which exits there are and how they project.
        prefix: of the module, for vLLM.
    """

    def __init__(self, config: ModelConfig, prefix: str) -> None:
        super().__init__()
        projection = config.projection
        assert projection is not None, "read_exits refuses a config without exits"
        self.names = {
            layer: name
            for layer in config.exit_layers
            if (name := exit_weight_name(projection, layer, config.num_layers))
        }
        # A module's name has no dots: the checkpoint's name without its ends.
        self.own = nn.ModuleDict(
            {str(layer): self._module(config, f"{prefix}.{layer}") for layer in self.names}
        )

    def _module(self, config: ModelConfig, prefix: str) -> Any:
        if config.projection is VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION:
            return ParallelLMHead(config.vocab_size, config.hidden_size, prefix=prefix)
        width = config.hidden_size
        return ReplicatedLinear(width, width, bias=False, prefix=prefix, return_bias=False)

    def load(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Take the checkpoint's tensors; the names of the parameters that were filled.

        Raises:
            ValueError: the checkpoint lacks one.
        """
        for layer, name in self.names.items():
            if name not in weights:
                raise ValueError(f"the exit of layer {layer} needs the tensor {name!r}")
            parameter: Any = self.own[str(layer)].weight
            parameter.weight_loader(parameter, weights[name])
        return {f"own.{layer}.weight" for layer in self.names}


class ModeLogits:
    """Logits of rows, each by its own mode.

    Args:
        config: which exits there are and how they project.
        weights: of the exits.
        lm_head: the model's own.
        final_norm: the model's norm after its last block.
        project: vLLM's product with a head that may be spread over processes.
        modes: row to mode; rows without one take the model's own head.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ExitWeights,
        lm_head: ParallelLMHead,
        final_norm: Callable[[Tensor], Tensor],
        project: LogitsProcessor,
        modes: Mapping[int, OfferedMode],
    ) -> None:
        self._config = config
        self._weights = weights
        self._lm_head = lm_head
        self._final_norm = final_norm
        self._project = project
        self._modes = modes
        self._planner = ExitPlanner(config)

    def __call__(self, taps: Mapping[int, Tensor]) -> Tensor | None:
        """Scores of every row.

        Args:
            taps: for each layer that a head reads, [rows, hidden] after its block.

        Returns:
            [rows, vocab] float32: logits, or log-probabilities where exits are contrasted. None
            in the processes to which vLLM gathers no logits.
        """
        last = taps[self._config.num_layers]
        modes: list[DecodingMode] = [self._modes.get(row, _ORIGINAL) for row in range(len(last))]
        plan = self._planner.plan(modes)
        scores = last.new_empty(len(last), self._config.vocab_size, dtype=torch.float32)
        for group in plan.groups:
            found = self._group(group, taps)
            if found is None:
                return None
            scores[list(group.rows)] = found
        return scores

    def _group(self, group: HeadGroup, taps: Mapping[int, Tensor]) -> Tensor | None:
        # Every process takes part in each product, those that are given no logits too.
        upper: Tensor | None = self._logits(group.upper, group, taps)
        lower: Tensor | None = (
            None if group.lower is None else self._logits(group.lower, group, taps)
        )
        if upper is None:
            return None
        if lower is None:
            return upper.float()
        alphas = upper.new_tensor(group.alphas, dtype=torch.float32)
        least = torch.tensor(group.min_candidates, device=upper.device)
        return contrast_logits(upper, lower, alphas, least)

    def _logits(self, head: Head, group: HeadGroup, taps: Mapping[int, Tensor]) -> Any:
        hidden = self._final_norm(taps[head.layer][list(group.rows)])
        if head.is_original or head.layer not in self._weights.names:
            return self._project(self._lm_head, hidden)
        own = self._weights.own[str(head.layer)]
        if self._config.projection is VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION:
            return self._project(own, hidden)
        return self._project(self._lm_head, own(hidden))
