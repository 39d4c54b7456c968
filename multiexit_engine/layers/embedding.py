"""Token and position embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from multiexit_engine.layers.norm import LayerNorm
from multiexit_engine.ops.rows import embed, take_rows


class Embedding(nn.Module):
    """Token embedding, plus a learned one of positions where the model has it.

    Args:
        tokens: [vocab, hidden].
        positions: [max_positions, hidden] or None.
    """

    def __init__(self, tokens: Tensor, positions: Tensor | None = None) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens, requires_grad=False)
        self.positions = None if positions is None else nn.Parameter(positions, requires_grad=False)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[tokens] and [tokens] int64 to [tokens, hidden]."""
        if self.positions is None:
            return take_rows(self.tokens, token_ids)
        return embed(token_ids, positions, self.tokens, self.positions, 1.0)


class NormedEmbedding(nn.Module):
    """``norm(scale * token + position)``, the positions' table beginning with unused rows.

    Args:
        tokens: [vocab, hidden].
        positions: [offset + max_positions, hidden].
        norm: of the sum.
        scale: factor of the tokens.
        offset: row of position 0.
    """

    def __init__(
        self, tokens: Tensor, positions: Tensor, norm: LayerNorm, scale: float, offset: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens, requires_grad=False)
        self.positions = nn.Parameter(positions, requires_grad=False)
        self.norm = norm
        self.scale = scale
        self.offset = offset

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[tokens] and [tokens] int64 to [tokens, hidden]."""
        places = positions + self.offset
        hidden = embed(token_ids, places, self.tokens, self.positions, self.scale)
        return self.norm(hidden)  # type: ignore[no-any-return]
