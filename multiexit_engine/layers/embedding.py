"""Token and position embeddings."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from multiexit_engine.layers.norm import LayerNorm


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
        hidden = functional.embedding(token_ids, self.tokens)
        if self.positions is not None:
            hidden = hidden + functional.embedding(positions, self.positions)
        return hidden


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
        hidden = functional.embedding(token_ids, self.tokens) * self.scale
        places = functional.embedding(positions + self.offset, self.positions)
        return self.norm(hidden + places)  # type: ignore[no-any-return]
