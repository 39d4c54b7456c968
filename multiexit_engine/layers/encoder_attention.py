"""Self-attention without order and without a cache: every token sees its whole text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from multiexit_engine.layers.linear import Linear
from multiexit_engine.ops.biased_attention import biased_packed_attention
from multiexit_engine.ops.packed_attention import packed_attention


class EncoderAttention(nn.Module):
    """One encoder block's attention over packed texts.

    Args:
        qkv: queries, keys and values in one matrix, in this order and of equal widths.
        output: back to the hidden size.
        head_dim: width of a head.
        scale: factor of the scores.
        bias: [heads, 2 * reach + 1] for distances, as ``biased_packed_attention`` wants it; None
            where positions are in the embedding.
    """

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        head_dim: int,
        scale: float,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bias = bias
        self.qkv = qkv
        self.output = output
        self.head_dim = head_dim
        self.scale = scale

    def forward(self, hidden: Tensor, lens: Sequence[int]) -> Tensor:
        """[tokens, hidden] to the same shape; ``lens`` are the tokens of each text."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(hidden).chunk(3, dim=-1)
        )
        if self.bias is None:
            mixed = packed_attention(query, key, value, lens, lens, self.scale)
        else:
            mixed = biased_packed_attention(query, key, value, lens, self.scale, self.bias)
        return self.output(mixed.flatten(1))  # type: ignore[no-any-return]
