"""Probes: how likely it is that an exit's token is that of the model's own head.

A probe reads the state that the exit's head would read, and costs as much as a few tokens of that
head. Knows nothing of thresholds, or of how probes learn.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.checkpoint.probes import (
    ProbeWeights,
    probe_digest,
    probe_file,
    read_probes,
)
from multiexit_engine.config import ModelConfig
from multiexit_engine.ops import linear, linear_activation

ACTIVATION = "relu"


class ExitProbes:
    """The probes of one model, read when they are first required.

    Args:
        config: of the model.
        loader: of its weights, which the file has to fit.

    Attributes:
        digest: tells the probes that were read from others; None while there are none.
    """

    def __init__(self, config: ModelConfig, loader: TensorLoader) -> None:
        self._config = config
        self._loader = loader
        self._probes: dict[int, ProbeWeights] = {}
        self.digest: str | None = None

    def require(self, layers: Iterable[int]) -> None:
        """Have the probes of these exits in memory.

        Raises:
            ValueError: there is none for one of them.
            CheckpointError: the file is damaged or belongs to another model.
        """
        wanted = set(layers)
        if not self._probes.keys() >= wanted:
            self._read()
        if missing := sorted(wanted - self._probes.keys()):
            path = probe_file(self._loader.weights)
            has = f"has probes at layers {sorted(self._probes)}" if self._probes else "is not there"
            raise ValueError(
                f"EarlyExit.measure='probe' at layer {missing[0]}: {path} {has}; run `multiexit "
                "train probes`"
            )

    def chances(self, layer: int, normed: Tensor) -> Tensor:
        """[rows] float32: how likely each row's token at an exit is that of full depth.

        Exact up to rounding; with the CPU kernels a row's number does not depend on the others.

        Args:
            layer: of the exit, required before.
            normed: [rows, hidden] after the model's final norm.
        """
        return probe_chances(self._probes[layer], normed)

    def _read(self) -> None:
        found = read_probes(self._loader.weights, self._config.hidden_size)
        self.digest = probe_digest(self._loader.weights) if found else None
        self._probes = {
            layer: ProbeWeights(*(part.to(self._loader.device) for part in probe))
            for layer, probe in found.items()
        }


def probe_chances(probe: ProbeWeights, normed: Tensor) -> Tensor:
    """[rows] float32 chances that a probe gives to [rows, hidden] normalised states.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.5 (early-exit classifier), with one
        hidden layer.
    """
    inner = linear_activation(normed.float(), probe.up, probe.up_bias, ACTIVATION)
    return torch.sigmoid(linear(inner, probe.down, probe.down_bias)[:, 0])
