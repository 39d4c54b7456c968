"""Probes: small networks that read the state which an exit's head would read.

They cost as much as a few tokens of that head. Knows nothing of what they tell, or how they learn.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.checkpoint.probes import (
    ProbeKind,
    ProbeWeights,
    probe_digest,
    probe_file,
    read_probes,
)
from multiexit_engine.config import ModelConfig
from multiexit_engine.ops import linear, linear_activation

ACTIVATION = "relu"


class Probes:
    """The probes of one model and kind, read when they are first required.

    Args:
        kind: what they tell.
        config: of the model.
        loader: of its weights, which the file has to fit.

    Attributes:
        digest: tells the probes that were read from others; None while there are none.
    """

    def __init__(self, kind: ProbeKind, config: ModelConfig, loader: TensorLoader) -> None:
        self._kind = kind
        self._config = config
        self._loader = loader
        self._probes: dict[int, ProbeWeights] = {}
        self.digest: str | None = None

    def require(self, layers: Iterable[int], asked_by: str) -> None:
        """Have the probes of these exits in memory; ``asked_by`` names the option in errors.

        Raises:
            ValueError: there is none for one of them.
            CheckpointError: the file is damaged or belongs to another model.
        """
        wanted = set(layers)
        if not self._probes.keys() >= wanted:
            self._read()
        if missing := sorted(wanted - self._probes.keys()):
            path = probe_file(self._loader.weights, self._kind)
            has = f"has probes at layers {sorted(self._probes)}" if self._probes else "is not there"
            raise ValueError(
                f"{asked_by} at layer {missing[0]}: {path} {has}; run `{self._kind.command}`"
            )

    def of(self, layer: int) -> ProbeWeights:
        """That of an exit, required before."""
        return self._probes[layer]

    def _read(self) -> None:
        weights, kind = self._loader.weights, self._kind
        found = read_probes(weights, self._config.hidden_size, kind)
        self.digest = probe_digest(weights, kind) if found else None
        self._probes = {
            layer: ProbeWeights(*(part.to(self._loader.device) for part in probe))
            for layer, probe in found.items()
        }


def chances_of(odds: Tensor) -> Tensor:
    """Chances, float32, of log-odds of any shape, whose bits do not depend on their places.

    PyTorch's float32 sigmoid gives the last few numbers of a CPU tensor, which do not fill a
    vector, other bits than the rest. In float64 the two differ by what rounding to float32 loses,
    but for one number in some hundred million.
    """
    return odds.double().sigmoid().float() if odds.device.type == "cpu" else odds.sigmoid()


def probe_outputs(probe: ProbeWeights, normed: Tensor) -> Tensor:
    """[rows, outputs] float32 of a probe for [rows, hidden] normalised states.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.5 (early-exit classifier), with one
        hidden layer.
    """
    inner = linear_activation(normed.float(), probe.up, probe.up_bias, ACTIVATION)
    return linear(inner, probe.down, probe.down_bias)
