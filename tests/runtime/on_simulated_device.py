"""Engines on the simulated device, beside the same engine on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from multiexit_engine import DecodingMode, Engine, RequestOutput, SamplingParams
from multiexit_engine.config import EngineConfig
from multiexit_engine.runtime import assembly, runner
from multiexit_engine.runtime.device.graph_parts import in_parts
from multiexit_engine.runtime.device.graphs import Capture
from tests.simulated_device import SimulatedDevice, simulated_device
from tests.simulated_device.kernels import use_kernels

SMALL = {"max_batch_size": 8, "kv_cache_memory": 2**22, "dtype": "float32"}


def on_cpu(folder: Path, **options) -> Engine:
    return Engine.from_pretrained(folder, device="cpu", backend="reference", **{**SMALL, **options})


@contextmanager
def on_device(
    folder: Path, *, has_kernels: bool = False, **options
) -> Iterator[tuple[Engine, SimulatedDevice]]:
    """An engine whose weights and cache lie on the simulated device, which may have kernels."""
    names = {"cuda_graphs", "async_scheduling", "conditional_nodes"} & options.keys()
    changes = {name: options.pop(name) for name in names}
    host = on_cpu(folder, **options)
    with simulated_device() as device, pytest.MonkeyPatch.context() as patch:
        for module in (assembly, runner):
            patch.setattr(module, "new_capture", lambda config: _capture(device, config))
        if has_kernels:
            use_kernels(patch)
            changes["backend"] = "auto"
        place = torch.device("sim:0")
        engine = Engine(host.checkpoint, replace(host.config, device=place, **changes), None)
        yield engine, device


def _capture(device: SimulatedDevice, config: EngineConfig) -> Capture:
    return in_parts(device.parts) if config.conditional_nodes else device.capture


def token_ids(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def counts_of_a_decode_step(
    folder: Path, sampling: list[SamplingParams], modes: list[DecodingMode]
) -> dict[str, int]:
    """What the host does in the third step, when every request decodes."""
    with on_device(folder) as (engine, device):
        for params, mode in zip(sampling, modes, strict=True):
            engine.add_request([1, 2, 3], params, mode)
        for _ in range(2):
            engine.step()
        device.counts.clear()
        engine.step()
        return dict(device.counts)
