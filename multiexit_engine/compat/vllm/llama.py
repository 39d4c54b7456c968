"""Llama with exits as a model of vLLM: vLLM's own, asked for the states after some layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import (
    make_empty_intermediate_tensors_factory,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from multiexit_engine.compat.vllm.causal_lm import Exits, shape_of, tapped_layers


class MultiExitLlama(LlamaForCausalLM):  # type: ignore[misc]
    """Multi-exit Llama: each row's logits by the mode that its request asked for.

    Args:
        vllm_config: of the engine; its model config states the exits.
        prefix: of the module's weights.

    Raises:
        ValueError: the config states no exits.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        tapped = tapped_layers(shape_of(vllm_config))
        # What drafting models read elsewhere: each layer's output before the next norm.
        self.set_aux_hidden_state_layers(tapped)
        self.make_empty_intermediate_tensors = self._with_taps(tapped)
        norm, exits = self.model.norm, maybe_prefix(prefix, "exits")
        self.exits = Exits(vllm_config, self.lm_head, norm, exits)

    def _with_taps(self, tapped: tuple[int, ...]) -> Any:
        """What the stage of a pipeline begins with: the running state, and earlier stages' taps."""
        key, start = self.model.AUX_HIDDEN_STATE_KEY, self.model.start_layer
        self._earlier = [f"{key}{i}" for i, layer in enumerate(tapped) if layer <= start]
        names = ["hidden_states", "residual", *self._earlier]
        return make_empty_intermediate_tensors_factory(names, self.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """The tapped states side by side; before the last stage what the next one needs."""
        found = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        if not isinstance(found, IntermediateTensors):
            return self.exits.join(found[1])
        # vLLM's own stage hands on its own taps only.
        for name in self._earlier:
            assert intermediate_tensors is not None
            found.tensors[name] = intermediate_tensors[name]
        return found

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[rows, vocab] float32 of rows that ``forward`` gave."""
        return self.exits.logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters of this process from the checkpoint's; the names of those filled."""
        others, loaded = self.exits.take_weights(weights)
        filled: set[str] = super().load_weights(others)
        return loaded | filled
