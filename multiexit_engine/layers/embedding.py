"""Token and position embeddings."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


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
