"""Figures of a multi-exit network on held-out tokens: perplexity, bits per byte, agreement.

It knows networks and blocks of token ids. It does not know training, files or sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from multiexit_engine.train.exits import MultiExitNetwork

LN_2 = math.log(2.0)


@dataclass(frozen=True)
class ExitFigures:
    """What one exit predicts: perplexity per token, and how often its best token is the last's."""

    layer: int
    perplexity: float
    bits_per_byte: float
    agreement: float


@torch.no_grad()
def measure_exits(
    network: MultiExitNetwork,
    blocks: Tensor,
    bytes_per_token: float,
    rows_per_batch: int = 16,
    autocast: bool = False,
) -> list[ExitFigures]:
    """Figures of every exit over `blocks` [rows, tokens], shallowest first.

    The first token of each row is context only. `bytes_per_token` is that of the measured text.
    """
    device = network.output_weight.device
    losses = torch.zeros(len(network.layers), dtype=torch.float64, device=device)
    agreements = torch.zeros_like(losses)
    for rows in torch.split(blocks, rows_per_batch):
        ids = rows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            sums, choices = _loss_sums_and_choices(network, ids)
        losses += sums
        agreements += (choices == choices[-1]).sum(dim=(1, 2))
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return [
        ExitFigures(
            layer=layer,
            perplexity=math.exp(loss / tokens),
            bits_per_byte=loss / tokens / LN_2 / bytes_per_token,
            agreement=agreement / tokens,
        )
        for layer, loss, agreement in zip(
            network.layers, losses.tolist(), agreements.tolist(), strict=True
        )
    ]


def _loss_sums_and_choices(network: MultiExitNetwork, ids: Tensor) -> tuple[Tensor, Tensor]:
    sums, choices = [], []
    targets = ids[:, 1:].reshape(-1)
    for _, logits in network.exit_logits(ids):
        predicted = logits[:, :-1].float()
        sums.append(F.cross_entropy(predicted.flatten(0, 1), targets, reduction="sum"))
        choices.append(predicted.argmax(dim=-1))
    return torch.stack(sums).double(), torch.stack(choices)


@torch.no_grad()
def contrast_perplexity(
    network: MultiExitNetwork, blocks: Tensor, upper: int, lower: int, alpha: float = 0.1
) -> float:
    """Perplexity of the contrasted distribution of two exits over `blocks` [rows, tokens]."""
    total = 0.0
    for rows in torch.split(blocks, 4):
        ids = rows.to(network.output_weight.device)
        logits = dict(network.exit_logits(ids))
        log_probs = contrast_log_probs(logits[upper][:, :-1], logits[lower][:, :-1], alpha)
        total -= float(log_probs.gather(-1, ids[:, 1:, None]).double().sum())
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


def contrast_log_probs(upper: Tensor, lower: Tensor, alpha: float) -> Tensor:
    """Log-probabilities of auto-contrastive decoding, for any leading shape.

    Source: Gera et al. 2023 (arXiv 2305.01628), `calculate_contrasted_logits`; in fp32 log space.
    """
    log_p = upper.float().log_softmax(dim=-1)
    inside = log_p >= log_p.amax(dim=-1, keepdim=True) + math.log(alpha)
    mass = log_p.masked_fill(~inside, -torch.inf).logsumexp(dim=-1, keepdim=True)
    scores = (log_p - lower.float()).masked_fill(~inside, -torch.inf)
    return torch.where(inside, scores.log_softmax(dim=-1) + mass, log_p)
