"""Fits the small networks that probes are, by gradient descent on states.

Knows nothing of what they learn, or where states come from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from multiexit_engine.checkpoint.probes import ProbeWeights

BATCH_SIZE = 1024
WEIGHT_DECAY = 0.01


def fit_network(
    states: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    units: int,
    num_outputs: int,
    epochs: int,
    learning_rate: float,
) -> ProbeWeights:
    """A network of one hidden layer that reads states as they are.

    Args:
        states: [rows, hidden] float32.
        loss: of the outputs [rows, num_outputs] of some rows, which [rows] int64 tells.
        units: of the hidden layer.
        num_outputs: of the network.
        epochs: passes over the states.
        learning_rate: peak rate of AdamW; it rises over the first and falls over the other steps.
    """
    mean, scale = states.mean(0), states.std(0).clamp_min(1e-6)
    network = nn.Sequential(
        nn.Linear(states.shape[1], units), nn.ReLU(), nn.Linear(units, num_outputs)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    num_batches = -(-len(states) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * num_batches
    )
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(states)), BATCH_SIZE):
            torch.autograd.backward(loss(network((states[rows] - mean) / scale), rows))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    up, up_bias, down, down_bias = (part.detach() for part in network.parameters())
    up = up / scale
    return ProbeWeights(up, up_bias - up @ mean, down, down_bias)
