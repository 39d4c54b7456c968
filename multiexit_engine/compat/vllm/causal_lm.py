"""What the model classes share that vLLM runs with exits: taps in, each row's logits out.

Knows nothing of a family's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from multiexit_engine.compat.vllm.decoder import TappedDecoder
from multiexit_engine.compat.vllm.heads import ExitWeights, ModeLogits
from multiexit_engine.compat.vllm.request_modes import read_exits
from multiexit_engine.compat.vllm.row_modes import modes_of
from multiexit_engine.config import ModelConfig


class Exits(nn.Module):
    """The exits of a model, and logits from the states after its tapped layers.

    Args:
        vllm_config: of the engine; its model config states the exits.
        lm_head: the model's own.
        final_norm: the model's norm after its last block.
        prefix: of the module's weights.

    Raises:
        ValueError: the config states no exits, or the weights are to be quantized.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        lm_head: ParallelLMHead,
        final_norm: Callable[[Tensor], Tensor],
        prefix: str,
    ) -> None:
        super().__init__()
        if vllm_config.quant_config is not None:
            raise ValueError("quantization: multi-exit models inside vLLM run unquantized")
        shape = shape_of(vllm_config)
        self.weights = ExitWeights(shape, prefix)
        self._tapped = tapped_layers(shape)
        project = LogitsProcessor(shape.vocab_size)
        modes = modes_of(vllm_config)
        self._mode_logits = ModeLogits(shape, self.weights, lm_head, final_norm, project, modes)

    def join(self, taps: Sequence[Tensor]) -> Tensor:
        """[tokens, hidden * tapped layers]: vLLM picks the rows that it needs of one tensor."""
        return torch.cat(list(taps), dim=-1)

    def logits(self, joined: Tensor) -> Tensor | None:
        """[rows, vocab] float32 of rows that ``join`` gave, each by its request's mode."""
        taps = joined.chunk(len(self._tapped), dim=-1)
        return self._mode_logits(dict(zip(self._tapped, taps, strict=True)))

    def take_weights(
        self, weights: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[tuple[str, Tensor]], set[str]]:
        """Fill the exits from a checkpoint; its other weights, and the names of those filled."""
        # vLLM reads every file of tensors in a folder, that of the exits' probes ("2.down") too.
        everything = {name: tensor for name, tensor in weights if not name[0].isdecimal()}
        own = {name: everything.pop(name) for name in list(everything) if _is_exits(name)}
        loaded = self.weights.load(own)
        return list(everything.items()), {f"exits.weights.{name}" for name in loaded}


class DecoderLM(nn.Module, SupportsPP):  # type: ignore[misc]
    """A multi-exit model of ``TappedDecoder``'s kind; families say how blocks are made and named.

    Args:
        vllm_config: of the engine; its model config states the exits.
        prefix: of the module's weights.

    Raises:
        ValueError: as ``Exits``.
    """

    mapper: ClassVar[WeightsMapper]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        shape = shape_of(vllm_config)
        self.config = vllm_config.model_config.hf_config
        self.transformer = TappedDecoder(
            vllm_config=vllm_config,
            new_block=partial(self.new_block, vllm_config),
            tapped=tapped_layers(shape),
            prefix=maybe_prefix(prefix, "transformer"),
        )
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors
        self.lm_head = ParallelLMHead(
            shape.vocab_size, shape.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if shape.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        final_norm = self.transformer.ln_f
        self.exits = Exits(vllm_config, self.lm_head, final_norm, maybe_prefix(prefix, "exits"))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[tokens, hidden] of [tokens] ids."""
        return self.transformer.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """The tapped states side by side; before the last stage what the next one needs."""
        found = self.transformer(input_ids, positions, intermediate_tensors, inputs_embeds)
        return found if isinstance(found, IntermediateTensors) else self.exits.join(found)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[rows, vocab] float32 of rows that ``forward`` gave."""
        return self.exits.logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters of this process from the checkpoint's; the names of those filled."""
        others, loaded = self.exits.take_weights(weights)
        laid_out = [(name, self.laid_out(name, tensor)) for name, tensor in others]
        filled: set[str] = AutoWeightsLoader(self).load_weights(laid_out, mapper=self.mapper)
        return loaded | filled

    @staticmethod
    def new_block(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """A block, which takes and gives [tokens, hidden]."""
        raise NotImplementedError

    @staticmethod
    def laid_out(name: str, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint with the axes that vLLM's layers have."""
        return tensor


def shape_of(vllm_config: VllmConfig) -> ModelConfig:
    """The model's shape with its exits; raises ValueError where its config states none."""
    hf_config = vllm_config.model_config.hf_config
    return read_exits(hf_config.model_type, hf_config.to_dict())


def tapped_layers(config: ModelConfig) -> tuple[int, ...]:
    """1-based layers whose outputs a head reads, ascending; the last one always is."""
    return tuple(sorted({*config.exit_layers, config.num_layers}))


def _is_exits(name: str) -> bool:
    return name.startswith(("name_to_lm_exit_head.", "name_to_conv_matrix."))
