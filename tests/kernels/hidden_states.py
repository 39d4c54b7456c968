"""Two exits that mostly agree, and what the exact formulas make of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from multiexit_engine.ops.contrast import contrast_logits
from multiexit_engine.ops.sampling import gumbel_noise


@dataclass(frozen=True)
class TwoExits:
    upper_hidden: Tensor
    upper_weight: Tensor
    lower_hidden: Tensor
    lower_weight: Tensor
    alpha: Tensor
    temperature: Tensor
    seeds: Tensor
    positions: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def head_args(self, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
        drawing = (self.temperature, self.seeds, self.positions)
        return self.upper_hidden, self.upper_weight, bias, *drawing

    def to(self, device: str) -> TwoExits:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def two_exits(
    rows: int,
    vocab: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    spread: float = 4.0,
    alpha: float = 0.1,
    temperature: float = 0.0,
    seed: int = 0,
    shared: bool = False,
) -> TwoExits:
    """``spread`` is the standard deviation of logits; small ones make every token plausible."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    upper_hidden = normal(rows, width)
    lower_hidden = 0.7 * upper_hidden + 0.7 * normal(rows, width)
    upper_weight = normal(vocab, width) * spread / width**0.5
    lower_weight = 0.8 * upper_weight + 0.6 * normal(vocab, width) * spread / width**0.5
    upper_weight = upper_weight.to(dtype)
    return TwoExits(
        upper_hidden.to(dtype),
        upper_weight,
        lower_hidden.to(dtype),
        upper_weight if shared else lower_weight.to(dtype),
        torch.full((rows,), alpha),
        torch.full((rows,), temperature),
        torch.arange(rows) * 7919 - 3,
        torch.arange(rows) + 100,
    )


def exact_head(case: TwoExits, bias: Tensor | None = None) -> Tensor:
    """[rows, vocab] float64 log-probabilities."""
    logits = case.upper_hidden.double() @ case.upper_weight.double().T
    return (logits if bias is None else logits + bias.double()).log_softmax(-1)


def exact_contrast(case: TwoExits) -> Tensor:
    """[rows, vocab] float64 log-probabilities."""
    upper = case.upper_hidden.double() @ case.upper_weight.double().T
    lower = case.lower_hidden.double() @ case.lower_weight.double().T
    return contrast_logits.reference(upper, lower, case.alpha)


def assert_chosen(
    result: tuple[Tensor, Tensor], log_probs: Tensor, case: TwoExits, tolerance: float = 1e-5
) -> None:
    """Tokens are those that ``log_probs`` give, ties within ``tolerance`` apart; so are values."""
    tokens, logprobs = (part.cpu() for part in result)
    sampled = (case.temperature > 0)[:, None]
    keys = log_probs / torch.where(sampled, case.temperature[:, None], 1.0)
    noise = gumbel_noise.reference(case.seeds, case.positions, log_probs.shape[1]).double()
    keys = keys + torch.where(sampled, noise, 0.0)
    behind = keys.amax(-1) - keys.gather(1, tokens[:, None])[:, 0]
    assert behind.max() <= 10 * tolerance, f"rows choose a token that is {behind.tolist()} behind"
    error = (logprobs.double() - log_probs.gather(1, tokens[:, None])[:, 0]).abs().max()
    assert error <= tolerance, f"log-probabilities are off by {error:.1e}"
