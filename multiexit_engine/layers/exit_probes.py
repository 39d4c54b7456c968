"""Exit probes: how likely it is that an exit's token is that of the model's own head.

Knows nothing of thresholds, or of how probes learn.
"""

from __future__ import annotations

from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.checkpoint.probes import EXIT_PROBES, ProbeWeights
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.probes import Probes, chances_of, probe_outputs


class ExitProbes(Probes):
    """The exit probes of one model; arguments as of ``Probes``."""

    def __init__(self, config: ModelConfig, loader: TensorLoader) -> None:
        super().__init__(EXIT_PROBES, config, loader)

    def chances(self, layer: int, normed: Tensor) -> Tensor:
        """[rows] float32: how likely each row's token at an exit is that of full depth.

        Exact up to rounding; with the CPU kernels a row's number does not depend on the others.

        Args:
            layer: of the exit, required before.
            normed: [rows, hidden] after the model's final norm.
        """
        return probe_chances(self.of(layer), normed)


def probe_chances(probe: ProbeWeights, normed: Tensor) -> Tensor:
    """[rows] float32 chances that a probe gives to [rows, hidden] normalised states."""
    return chances_of(probe_outputs(probe, normed)[:, 0])
