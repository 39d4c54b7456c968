"""The tables of rotary position embedding, shared by all layers of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multiexit_engine.config import RopeConfig
from multiexit_engine.ops.rotary import rotary


class Rotary(nn.Module):
    """Turns queries and keys by their positions, up to ``max_positions``."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, rope: RopeConfig, max_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
        angles = torch.arange(max_positions, device=device).float()[:, None] * inv_freq
        self.register_buffer("cos", (angles.cos() * rope.attention_scaling).to(dtype))
        self.register_buffer("sin", (angles.sin() * rope.attention_scaling).to(dtype))

    def forward(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, heads, head_dim] and [tokens, kv_heads, head_dim], turned."""
        return rotary(query, key, self.cos, self.sin, positions)
