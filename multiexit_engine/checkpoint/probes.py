"""Exit probes of a model: a safetensors file beside its weights.

Knows the file and for which weights it was made; nothing of what a probe computes or how it learns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from multiexit_engine.checkpoint.weights import Weights
from multiexit_engine.errors import CheckpointError

FILE_NAME = "exit_probes.safetensors"
AGAIN = "run `multiexit train probes` again"


class ProbeWeights(NamedTuple):
    """A classifier of one hidden layer, for the states at one exit; all float32.

    Attributes:
        up: [units, hidden].
        up_bias: [units].
        down: [1, units].
        down_bias: [1].
    """

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def probe_file(weights: Weights) -> Path:
    """Where the probes of a model belong."""
    return weights.folder / FILE_NAME


def read_probes(weights: Weights, hidden_size: int) -> dict[int, ProbeWeights]:
    """The probes beside a model by exit layer; none where there is no file.

    Raises:
        CheckpointError: the file is damaged, or was made for other weights.
    """
    path = probe_file(weights)
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            made_for = (file.metadata() or {}).get("model")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}); {AGAIN}") from error
    if made_for != fingerprint(weights):
        raise CheckpointError(f"{path} was made for a model with other weights; {AGAIN}")
    try:
        layers = sorted({int(name.split(".")[0]) for name in tensors})
        found = {
            layer: ProbeWeights(*(tensors[f"{layer}.{field}"] for field in ProbeWeights._fields))
            for layer in layers
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold whole probes ({error}); {AGAIN}") from error
    if any(not _is_whole(probe, hidden_size) for probe in found.values()):
        raise CheckpointError(f"{path} holds misshapen probes; {AGAIN}")
    return found


def write_probes(path: Path, probes: Mapping[int, ProbeWeights], weights: Weights) -> None:
    """Put probes into a file, for these weights only."""
    tensors = {
        f"{layer}.{field}": tensor.contiguous()
        for layer, probe in probes.items()
        for field, tensor in probe._asdict().items()
    }
    # not save_file, whose files only their owner can read
    path.write_bytes(save(tensors, {"model": fingerprint(weights)}))


def fingerprint(weights: Weights) -> str:
    """Tells models apart: a digest of the name, type, shape and first numbers of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(weights.names()):
        tensor = weights.get(name)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1)[:256].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def probe_digest(weights: Weights) -> str:
    """Tells the probes beside a model, which must be there, from others."""
    return hashlib.sha256(probe_file(weights).read_bytes()).hexdigest()


def _is_whole(probe: ProbeWeights, hidden_size: int) -> bool:
    units = len(probe.up)
    shapes = ((units, hidden_size), (units,), (1, units), (1,))
    return all(
        part.shape == shape and part.dtype is torch.float32
        for part, shape in zip(probe, shapes, strict=True)
    )
