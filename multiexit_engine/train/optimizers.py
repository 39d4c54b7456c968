"""Which parameter is stepped by which optimiser, and the learning rate over a run.

It knows names and shapes of parameters. It does not know the model they belong to or the data.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn, optim


def split_parameters(
    named: Iterable[tuple[str, nn.Parameter]],
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Parameters to train as (matrices of layers, embeddings, vectors and exit matrices)."""
    matrices, embeddings, others = [], [], []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and (".h." in name or ".layers." in name):
            matrices.append(parameter)
        elif any(part in name for part in ("wte", "wpe", "shared", "embed_positions")):
            embeddings.append(parameter)
        else:
            others.append(parameter)
    return matrices, embeddings, others


def layer_optimizers(
    network: nn.Module, matrix_rate: float, other_rate: float, weight_decay: float
) -> list[optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else; decay on matrices only."""
    matrices, embeddings, others = split_parameters(network.named_parameters())
    return [
        optim.Muon(
            matrices,
            lr=matrix_rate,
            weight_decay=weight_decay,
            momentum=0.95,
            # Scales the orthogonal update to the size of an AdamW step, so that both optimisers
            # take rates of one order (arXiv 2502.16982, section 2.2).
            adjust_lr_fn="match_rms_adamw",
        ),
        optim.AdamW(
            [{"params": embeddings}, {"params": others}],
            lr=other_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]


def rate_factor(step: int, share_done: float, warmup_steps: int, decay_share: float) -> float:
    """Share of the peak rate: it rises over the first steps, stays, then falls to zero.

    `share_done` is how much of the run is over, by whichever of steps and time ends it first.
    """
    rise = min(1.0, (step + 1) / warmup_steps)
    fall = min(1.0, (1.0 - share_done) / decay_share)
    return rise * max(fall, 0.0)


class RateSchedule:
    """Sets the rates of some optimisers to a share of what they were made with."""

    def __init__(
        self, optimizers: list[optim.Optimizer], warmup_steps: int, decay_share: float
    ) -> None:
        self._warmup_steps = warmup_steps
        self._decay_share = decay_share
        self._optimizers = optimizers
        self._peaks = [[float(group["lr"]) for group in each.param_groups] for each in optimizers]

    def set(self, step: int, share_done: float) -> None:
        """Sets the rates for this step."""
        factor = rate_factor(step, share_done, self._warmup_steps, self._decay_share)
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            # Asked for anew each time: loading a state replaces the groups of an optimiser.
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
