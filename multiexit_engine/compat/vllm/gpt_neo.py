"""GPT-Neo with exits as a model of vLLM, which has no GPT-Neo of its own.

GPT-Neo is GPT-2 with unscaled attention, no bias on queries, keys and values, and layers that
alternate between seeing everything and a window.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.gpt2 import GPT2MLP
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from multiexit_engine.compat.vllm.causal_lm import DecoderLM, shape_of


class NeoAttention(nn.Module):
    """Causal attention without scaling.

    Args:
        vllm_config: of the engine.
        prefix: of the module's weights.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        shape = shape_of(vllm_config)
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            shape.head_dim,
            shape.num_heads,
            bias=False,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.out_proj = RowParallelLinear(
            shape.hidden_size, shape.hidden_size, prefix=f"{prefix}.out_proj", return_bias=False
        )
        self.attn = Attention(
            shape.num_heads // get_tensor_model_parallel_world_size(),
            shape.head_dim,
            scale=1.0,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=shape.attention_windows[extract_layer_index(prefix)],
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden: Tensor) -> Any:
        """[tokens, hidden] of the same."""
        query, key, value = self.qkv_proj(hidden).chunk(3, dim=-1)
        return self.out_proj(self.attn(query, key, value))


class NeoBlock(nn.Module):
    """Attention and MLP, each after a norm and beside the residual.

    Args:
        vllm_config: of the engine.
        prefix: of the module's weights.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(width, eps=eps)
        self.attn = NeoAttention(vllm_config, f"{prefix}.attn")
        self.ln_2 = LayerNorm(width, eps=eps)
        inner = config.intermediate_size or 4 * width
        self.mlp = GPT2MLP(inner, config, prefix=f"{prefix}.mlp")

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] of the same."""
        hidden = hidden + self.attn(self.ln_1(hidden))
        after: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return after


class MultiExitGPTNeo(DecoderLM):
    """Multi-exit GPT-Neo: each row's logits by the mode that its request asked for.

    Args:
        vllm_config: of the engine; its model config states the exits.
        prefix: of the module's weights.

    Raises:
        ValueError: the config states no exits.
    """

    mapper = WeightsMapper(
        orig_to_new_substr={
            ".attn.attention.bias": None,
            ".attn.attention.masked_bias": None,
            ".attn.attention.": ".attn.",
        },
        orig_to_new_stacked={f".{part}_proj.": (".qkv_proj.", part) for part in "qkv"},
    )

    @staticmethod
    def new_block(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """A block of this file."""
        return NeoBlock(vllm_config, prefix)
