"""GPT-2 with exits as a model of vLLM."""

from __future__ import annotations

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gpt2 import GPT2Block
from vllm.model_executor.models.utils import WeightsMapper

from multiexit_engine.compat.vllm.causal_lm import DecoderLM

# What vLLM's blocks do not compute, with the value that leaves it out.
_SWITCHES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


class MultiExitGPT2(DecoderLM):
    """Multi-exit GPT-2: each row's logits by the mode that its request asked for.

    Args:
        vllm_config: of the engine; its model config states the exits.
        prefix: of the module's weights.

    Raises:
        ValueError: the config states no exits, or attention that vLLM's GPT-2 does not compute.
    """

    mapper = WeightsMapper(orig_to_new_substr={".attn.bias": None, ".attn.masked_bias": None})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        for name, value in _SWITCHES.items():
            if getattr(config, name, value) != value:
                raise ValueError(f"{name}={not value} in config.json: vLLM's GPT-2 needs {value}")
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def new_block(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """VLLM's own."""
        config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        block: nn.Module = GPT2Block(config, cache, prefix=prefix)
        return block

    @staticmethod
    def laid_out(name: str, tensor: Tensor) -> Tensor:
        """GPT-2's checkpoints have their matrices transposed."""
        is_matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        return tensor.t() if is_matrix else tensor
