"""The best tokens of heads, found by 8-bit codes first where that is faster; exact all the same.

Knows heads by their weights only; nothing of layers, modes or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multiexit_engine.ops import (
    CodedHead,
    are_codes_fast,
    code_head,
    code_hidden,
    coded_head_tokens,
    head_tokens,
    logit_errors,
)
from multiexit_engine.quantization import Weight

# of a head with fewer numbers the exact logits cost as little, since it stays in the cache
LEAST_NUMBERS = 1 << 21
# calls in a row that codes may leave open before they are given up
PATIENCE = 8


@dataclass(eq=False)
class _Rough:
    """A weight, which keeps its id, with its codes and the latest calls that they left open."""

    weight: Weight
    head: CodedHead | None
    num_open: int = 0


class RoughHeads:
    """The codes of heads, made when they are first asked for: a quarter of the heads' bytes."""

    def __init__(self) -> None:
        self._found: dict[int, _Rough] = {}

    def codes(self, weight: Weight) -> CodedHead | None:
        """Of a [vocab, hidden] head; None where its exact logits are the faster way."""
        # asked each time: a backend can be chosen for one call
        return self._rough(weight).head if are_codes_fast() else None

    def best_tokens(
        self, hidden: Tensor, weight: Weight, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens that ``head_tokens`` gives greedy rows, and less of their log-probabilities.

        Args:
            hidden: [rows, hidden_size].
            weight: [vocab, hidden_size] of the same dtype, or quantized; the same object each time.
            bias: [vocab] or None.

        Returns:
            [rows] int64, and [rows] float32: NaN where a row's numbers are no numbers, else 0 or
            the token's log-probability.
        """
        head = self.codes(weight)
        if head is None:
            return exact_best_tokens(hidden, weight, bias)
        assert isinstance(weight, Tensor), "quantized heads have no codes"
        states = code_hidden(hidden)
        errors = logit_errors(states, head, bias)
        tokens = coded_head_tokens(hidden, weight, states, head, errors, bias)
        log_probs = torch.zeros(hidden.shape[0])
        is_open = tokens < 0
        if bool(is_open.any()):
            tokens[is_open], log_probs[is_open] = exact_best_tokens(hidden[is_open], weight, bias)
        self._weigh(self._rough(weight), is_open)
        return tokens, log_probs

    def _rough(self, weight: Weight) -> _Rough:
        found = self._found.get(id(weight))
        if found is None:
            found = self._found[id(weight)] = _Rough(weight, _codes(weight))
        return found

    def _weigh(self, rough: _Rough, is_open: Tensor) -> None:
        """Give up codes that keep leaving most rows open: such rows cost both ways."""
        is_useless = 2 * int(is_open.sum()) > is_open.numel()
        rough.num_open = rough.num_open + 1 if is_useless else 0
        if rough.num_open >= PATIENCE:
            rough.head = None


def exact_best_tokens(hidden: Tensor, weight: Weight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[rows] int64 and [rows]: the most likely token of each row, and its log-probability."""
    nothing = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return head_tokens(hidden, weight, bias, nothing.float(), nothing, nothing)


def _codes(weight: Weight) -> CodedHead | None:
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    is_worth_it = weight.dtype is torch.float32 and weight.numel() >= LEAST_NUMBERS
    return code_head(weight) if is_worth_it else None
