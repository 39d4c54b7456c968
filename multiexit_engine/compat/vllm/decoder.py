"""Decoders with learned positions as vLLM runs them, with the states after some of their blocks.

Knows vLLM's layers; nothing of heads or of a family's blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import (
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "position_ids": 0,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class TappedDecoder(nn.Module):
    """Token and position embeddings and blocks, under the names of GPT-2's checkpoints.

    Args:
        vllm_config: of the engine.
        new_block: makes a block, which takes and gives [tokens, hidden], from its name.
        tapped: 1-based layers whose outputs are wanted, ascending, the last one among them.
        prefix: of the module's weights.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        new_block: Callable[[str], nn.Module],
        tapped: tuple[int, ...],
        prefix: str = "",
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.tapped = tapped
        self.wte = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.wte"
        )
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.start_layer, self.end_layer, self.h = make_layers(
            config.num_hidden_layers, lambda prefix: new_block(prefix), prefix=f"{prefix}.h"
        )
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        earlier = [f"tap_{layer}" for layer in tapped if layer <= self.start_layer]
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", *earlier], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[tokens, hidden] of [tokens] ids, without positions."""
        embedded: Tensor = self.wte(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None,
    ) -> Any:
        """[tokens, hidden] after each tapped block, none normalised.

        The stages of a pipeline before the last hand theirs on with the running state.
        """
        taps: list[Tensor] = []
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            hidden = inputs_embeds + self.wpe(position_ids)
        else:
            assert intermediate_tensors is not None
            hidden = intermediate_tensors["hidden_states"]
            for layer in self.tapped:
                if layer <= self.start_layer:
                    taps.append(intermediate_tensors[f"tap_{layer}"])
        for layer in range(self.start_layer, self.end_layer):
            hidden = self.h[layer](hidden)
            if layer + 1 in self.tapped:
                taps.append(hidden)
        if get_pp_group().is_last_rank:
            return taps
        kept = {f"tap_{layer}": tap for layer, tap in zip(self.tapped, taps, strict=False)}
        return IntermediateTensors({"hidden_states": hidden, **kept})
