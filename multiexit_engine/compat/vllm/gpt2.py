"""GPT-2 with exits as a model of vLLM: vLLM's own blocks, and the states after some of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gpt2 import GPT2LMHeadModel, GPT2Model
from vllm.model_executor.models.utils import (
    make_empty_intermediate_tensors_factory,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from multiexit_engine.compat.vllm.heads import ExitWeights, ModeLogits
from multiexit_engine.compat.vllm.request_modes import read_exits
from multiexit_engine.compat.vllm.row_modes import modes_of
from multiexit_engine.config import ModelConfig


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "position_ids": 0,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class TappedGPT2(GPT2Model):  # type: ignore[misc]
    """vLLM's GPT-2 that keeps the states after tapped layers.

    Args:
        vllm_config: of the engine.
        prefix: of the module's weights.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tapped = tapped_layers(_shape(vllm_config))
        earlier = [f"tap_{layer}" for layer in self.tapped if layer <= self.start_layer]
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", *earlier], self.embed_dim
        )

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor | IntermediateTensors:
        """[tokens, hidden * tapped layers]: the tapped states side by side, none normalised.

        vLLM picks the rows that it needs of one tensor. The stages of a pipeline before the last
        give their states apart.
        """
        taps: list[Tensor] = []
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
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
            return torch.cat(taps, dim=-1)
        kept = {f"tap_{layer}": tap for layer, tap in zip(self.tapped, taps, strict=False)}
        return IntermediateTensors({"hidden_states": hidden, **kept})


class MultiExitGPT2(GPT2LMHeadModel):  # type: ignore[misc]
    """Multi-exit GPT-2: each row's logits by the mode that its request asked for.

    Args:
        vllm_config: of the engine; its model config states the exits.
        prefix: of the module's weights.

    Raises:
        ValueError: the config states no exits, or attention that vLLM's GPT-2 does not compute.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        shape = _shape(vllm_config)
        if not vllm_config.model_config.hf_config.scale_attn_weights:
            raise ValueError("scale_attn_weights=False in config.json: vLLM's GPT-2 always scales")
        if vllm_config.quant_config is not None:
            raise ValueError("quantization: multi-exit models inside vLLM run unquantized")
        # Not GPT2LMHeadModel's own, which would make blocks without taps.
        nn.Module.__init__(self)
        self.config = vllm_config.model_config.hf_config
        self.transformer = TappedGPT2(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer")
        )
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors
        self.lm_head = ParallelLMHead(
            shape.vocab_size, shape.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if shape.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.exits = ExitWeights(shape, f"{prefix}.exits")
        self._tapped = tapped_layers(shape)
        self._mode_logits = ModeLogits(
            shape,
            self.exits,
            self.lm_head,
            self.transformer.ln_f,
            LogitsProcessor(shape.vocab_size),
            modes_of(vllm_config),
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[rows, vocab] float32 of the [rows, hidden * tapped layers] that ``forward`` gave."""
        taps = hidden_states.chunk(len(self._tapped), dim=-1)
        return self._mode_logits(dict(zip(self._tapped, taps, strict=True)))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters of this process from the checkpoint's; the names of those filled."""
        everything = dict(weights)
        own = {name: everything.pop(name) for name in list(everything) if _is_exits(name)}
        loaded: set[str] = super().load_weights(everything.items())
        return loaded | {f"exits.{name}" for name in self.exits.load(own)}


def tapped_layers(config: ModelConfig) -> tuple[int, ...]:
    """1-based layers whose outputs a head reads, ascending; the last one always is."""
    return tuple(sorted({*config.exit_layers, config.num_layers}))


def _shape(vllm_config: VllmConfig) -> ModelConfig:
    hf_config = vllm_config.model_config.hf_config
    return read_exits(hf_config.model_type, hf_config.to_dict())


def _is_exits(name: str) -> bool:
    return name.startswith(("name_to_lm_exit_head.", "name_to_conv_matrix."))
