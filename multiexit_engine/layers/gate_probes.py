"""Gate probes: what a whole head would say of a row's prediction, foretold from its state.

Knows nothing of thresholds, or of how probes learn.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.checkpoint.probes import GATE_PROBES, ProbeWeights
from multiexit_engine.config import ModelConfig
from multiexit_engine.layers.probes import Probes, probe_outputs
from multiexit_engine.ops import gate_odds


class Forecast(NamedTuple):
    """A logistic distribution for each of two measures of a row.

    The measures are the log-odds of the best token, and the logarithm of the entropy in nats.

    Attributes:
        centres: [rows, 2] float32, the medians.
        log_scales: [rows, 2] float32: the chance of less than x is sigmoid((x - centre) / scale).
    """

    centres: Tensor
    log_scales: Tensor


class GateProbes(Probes):
    """The gate probes of one model; arguments as of ``Probes``."""

    def __init__(self, config: ModelConfig, loader: TensorLoader) -> None:
        super().__init__(GATE_PROBES, config, loader)

    def odds(self, layer: int, normed: Tensor, thresholds: Tensor, by_entropy: Tensor) -> Tensor:
        """[rows] float32: log-odds that rows pass the test after a layer that was required before.

        Exact up to rounding; with the CPU kernels a row's numbers do not depend on the others.

        Args:
            layer: 1-based.
            normed: [rows, hidden] after the model's final norm.
            thresholds: [rows] float32, on the scale of the forecasts.
            by_entropy: [rows] bool, whether a row's measure is the entropy.
        """
        return gate_odds(normed, *self.of(layer), thresholds, by_entropy)


def probe_forecast(probe: ProbeWeights, normed: Tensor) -> Forecast:
    """What a probe gives for [rows, hidden] normalised states."""
    return Forecast(*probe_outputs(probe, normed).chunk(2, dim=1))
