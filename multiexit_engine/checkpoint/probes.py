"""Probes of a model: a safetensors file of each kind beside its weights.

Knows the files and for which weights they were made; nothing of what a probe computes, or how it
learns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from multiexit_engine.checkpoint.weights import Weights
from multiexit_engine.errors import CheckpointError

FILE_NAME = "exit_probes.safetensors"


@dataclass(frozen=True, slots=True)
class ProbeKind:
    """What probes tell.

    Attributes:
        file_name: in the model's folder.
        num_outputs: numbers that each gives for a row.
        command: makes them.
    """

    file_name: str
    num_outputs: int
    command: str


EXIT_PROBES = ProbeKind(FILE_NAME, 1, "multiexit train probes")
GATE_PROBES = ProbeKind("gate_probes.safetensors", 4, "multiexit train gates")


class ProbeWeights(NamedTuple):
    """A network of one hidden layer, for the states at one exit; all float32.

    Attributes:
        up: [units, hidden].
        up_bias: [units].
        down: [outputs, units].
        down_bias: [outputs].
    """

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def probe_file(weights: Weights, kind: ProbeKind = EXIT_PROBES) -> Path:
    """Where the probes of a model belong."""
    return weights.folder / kind.file_name


def read_probes(
    weights: Weights, hidden_size: int, kind: ProbeKind = EXIT_PROBES
) -> dict[int, ProbeWeights]:
    """The probes beside a model by exit layer; none where there is no file.

    Raises:
        CheckpointError: the file is damaged, or was made for other weights.
    """
    path, again = probe_file(weights, kind), f"run `{kind.command}` again"
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            made_for = (file.metadata() or {}).get("model")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}); {again}") from error
    if made_for != fingerprint(weights):
        raise CheckpointError(f"{path} was made for a model with other weights; {again}")
    try:
        layers = sorted({int(name.split(".")[0]) for name in tensors})
        found = {
            layer: ProbeWeights(*(tensors[f"{layer}.{field}"] for field in ProbeWeights._fields))
            for layer in layers
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold whole probes ({error}); {again}") from error
    if any(not _is_whole(probe, hidden_size, kind) for probe in found.values()):
        raise CheckpointError(f"{path} holds misshapen probes; {again}")
    return found


def write_probes(path: Path, probes: Mapping[int, ProbeWeights], weights: Weights) -> None:
    """Put probes into a file, for these weights only; makes its folder."""
    tensors = {
        f"{layer}.{field}": tensor.contiguous()
        for layer, probe in probes.items()
        for field, tensor in probe._asdict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
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


def probe_digest(weights: Weights, kind: ProbeKind = EXIT_PROBES) -> str:
    """Tells the probes beside a model, which must be there, from others."""
    return hashlib.sha256(probe_file(weights, kind).read_bytes()).hexdigest()


def _is_whole(probe: ProbeWeights, hidden_size: int, kind: ProbeKind) -> bool:
    units, outputs = len(probe.up), kind.num_outputs
    shapes = ((units, hidden_size), (units,), (outputs, units), (outputs,))
    return all(
        part.shape == shape and part.dtype is torch.float32
        for part, shape in zip(probe, shapes, strict=True)
    )
