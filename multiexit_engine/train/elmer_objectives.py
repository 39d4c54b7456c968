"""ELMER's two objectives, and its decoding of a whole target at once.

It knows states, exit layers and losses. It does not know where the pairs come from, nor steps.

Source: RUCAIBox/ELMER, `pre-train/modeling_bart.py` (hard: states frozen at prescribed layers) and
`fine-tune/modeling_bart.py` (soft: predictions fed upward). Exits by confidence are the paper's
(arXiv 2210.13304); its code has none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from multiexit_engine.train.elmer_network import PAD, ElmerNetwork


@dataclass(frozen=True)
class PairBatch:
    """Sources and targets of equal rows, padded.

    Attributes:
        source_ids: [batch, source], int64.
        source_mask: [batch, source], True where there is a token.
        target_mask: [batch, length], True on the positions of a row: at least those of its labels.
        labels: [batch, length], int64: the target with its end, then padding.
    """

    source_ids: Tensor
    source_mask: Tensor
    target_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on a device."""
        return PairBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def draw_exit_layers(
    shape: tuple[int, int], num_layers: int, full_share: float, generator: torch.Generator
) -> Tensor:
    """For each target position the layer it leaves at, 1-based, int64 [batch, length].

    Uniform and independent per token, as ELMER draws them; in `full_share` of the rows every token
    stays to the last layer, so that one pass without exits is trained too.
    """
    layers = torch.randint(1, num_layers + 1, shape, generator=generator)
    is_full = torch.rand(shape[0], 1, generator=generator) < full_share
    return layers.masked_fill(is_full, num_layers)


def exit_states(
    network: ElmerNetwork,
    source: Tensor,
    source_mask: Tensor,
    target_mask: Tensor,
    exit_layers: Tensor,
) -> Tensor:
    """The state that each position left with [batch, length, width].

    From its exit on, a position's state is copied upward and seen by the layers above; no gradient
    flows through what they see of it.

    Args:
        network: the network.
        source: encoder states [batch, source, width].
        source_mask: [batch, source], True where there is a token.
        target_mask: [batch, length], True on the positions of a row.
        exit_layers: [batch, length], 1-based.
    """
    states = network.first_states(*target_mask.shape)
    left_with = torch.zeros_like(states)
    for index in range(int(exit_layers.max())):
        after = network.decoder_layer(index, states, target_mask, source, source_mask)
        left_with = torch.where((exit_layers == index + 1)[..., None], after, left_with)
        has_left = (exit_layers <= index + 1)[..., None]
        states = torch.where(has_left, left_with.detach(), after)
    return left_with


def hard_loss(network: ElmerNetwork, batch: PairBatch, exit_layers: Tensor) -> Tensor:
    """Mean cross entropy of the labels, each predicted at its exit layer (layer permutation)."""
    source = network.encode(batch.source_ids, batch.source_mask)
    states = exit_states(network, source, batch.source_mask, batch.target_mask, exit_layers)
    is_label = batch.labels != PAD
    return F.cross_entropy(network.logits(states[is_label]).float(), batch.labels[is_label])


def soft_losses(
    network: ElmerNetwork, batch: PairBatch, label_share: float, generator: torch.Generator
) -> Tensor:
    """Cross entropies of the labels at every layer [layers]; training steps on their mean.

    Between two layers each position is joined with its best token so far, or, in `label_share` of
    the positions, with its label.
    """
    source = network.encode(batch.source_ids, batch.source_mask)
    states = network.first_states(*batch.labels.shape)
    is_label = batch.labels != PAD
    targets = batch.labels[is_label]
    losses = []
    for index in range(network.shape.decoder_layers):
        states = network.decoder_layer(index, states, batch.target_mask, source, batch.source_mask)
        # without bias, for the feedback; the loss adds it
        logits = network.logits(states[batch.target_mask], with_bias=False)
        wanted = (logits + network.final_logits_bias)[is_label[batch.target_mask]]
        losses.append(F.cross_entropy(wanted.float(), targets))
        if index + 1 < network.shape.decoder_layers:
            best = torch.full_like(batch.labels, PAD)
            best[batch.target_mask] = logits.detach().argmax(dim=-1)
            is_told = torch.rand(best.shape, generator=generator).to(best.device) < label_share
            states = network.feed_back(states, torch.where(is_told & is_label, batch.labels, best))
    return torch.stack(losses)


@dataclass(frozen=True)
class ParallelTokens:
    """Every position's best token and the layer it left at, 1-based; int64 [batch, length]."""

    ids: Tensor
    exit_layers: Tensor


Measure = Literal["entropy", "max_prob"]


@torch.no_grad()
def decode_by_confidence(
    network: ElmerNetwork,
    source_ids: Tensor,
    source_mask: Tensor,
    target_mask: Tensor,
    threshold: float,
    measure: Measure = "entropy",
) -> ParallelTokens:
    """Tokens of one pass in which a position leaves as soon as it is sure of its token.

    Sure means an entropy in nats of at most `threshold`, or a probability of at least it. With an
    entropy below 0 nothing leaves early: the plain pass with one head.
    """
    source = network.encode(source_ids, source_mask)
    states = network.first_states(*target_mask.shape)
    num_layers = network.shape.decoder_layers
    ids = torch.full(target_mask.shape, PAD, device=states.device)
    exit_layers = torch.full_like(ids, num_layers)
    is_active = torch.ones_like(target_mask)
    for layer in range(1, num_layers + 1):
        after = network.decoder_layer(layer - 1, states, target_mask, source, source_mask)
        states = torch.where(is_active[..., None], after, states)
        logits = network.logits(states).float()
        is_sure = _is_sure(logits, threshold, measure) | torch.tensor(layer == num_layers)
        leaves = is_active & is_sure
        ids = torch.where(leaves, logits.argmax(dim=-1), ids)
        exit_layers = torch.where(leaves, layer, exit_layers)
        is_active = is_active & ~is_sure
        if not is_active.any():
            break
    return ParallelTokens(ids, exit_layers)


def _is_sure(logits: Tensor, threshold: float, measure: Measure) -> Tensor:
    log_probs = logits.log_softmax(dim=-1)
    if measure == "max_prob":
        return log_probs.amax(dim=-1).exp() >= threshold
    return -(log_probs.exp() * log_probs).sum(dim=-1) <= threshold


@torch.no_grad()
def decode_softly(
    network: ElmerNetwork, source_ids: Tensor, source_mask: Tensor, target_mask: Tensor
) -> ParallelTokens:
    """Tokens of the pass that feeds every layer's predictions to the next one; all layers run."""
    source = network.encode(source_ids, source_mask)
    states = network.first_states(*target_mask.shape)
    num_layers = network.shape.decoder_layers
    for index in range(num_layers):
        states = network.decoder_layer(index, states, target_mask, source, source_mask)
        if index + 1 < num_layers:
            best = network.logits(states, with_bias=False).argmax(dim=-1)
            states = network.feed_back(states, best)
    ids = network.logits(states).argmax(dim=-1)
    return ParallelTokens(ids, torch.full_like(ids, num_layers))
