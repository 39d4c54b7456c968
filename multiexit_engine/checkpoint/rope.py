"""Rotary frequencies of a config, by transformers' own formulas, as plain numbers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from multiexit_engine.config import RopeConfig
from multiexit_engine.errors import CheckpointError

# longrope and dynamic change their frequencies with the length of the text, also for keys that
# are cached already. Up to max_position_embeddings dynamic never does; longrope has no such range.
SUPPORTED = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(config: Any, head_dim: int) -> RopeConfig:
    """The frequencies of a transformers config that has ``rope_parameters``.

    "dynamic" is served up to ``max_position_embeddings``, where it equals "default".

    Raises:
        CheckpointError: a kind of scaling, or a partial rotation, that the engine lacks.
    """
    parameters: dict[str, Any] = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED:
        raise CheckpointError(
            f"rope_type={kind!r} in config.json: supported are {', '.join(SUPPORTED)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']!r} in config.json: only "
            "1.0, rotation of whole heads, is supported"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim={head_dim} must be even to be rotated")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq, scaling = 1.0 / (parameters.get("rope_theta", 10000.0) ** exponents), 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RopeConfig(kind, tuple(inv_freq.tolist()), float(scaling))
