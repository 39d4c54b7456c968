"""Which builder makes which model type."""

from __future__ import annotations

from collections.abc import Callable

import torch

from multiexit_engine.checkpoint import Checkpoint, TensorLoader
from multiexit_engine.config import ModelConfig
from multiexit_engine.errors import CheckpointError
from multiexit_engine.models.bart import build_bart
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.models.elmer import build_elmer
from multiexit_engine.models.gpt2 import build_gpt2
from multiexit_engine.models.gpt_neo import build_gpt_neo
from multiexit_engine.models.llama import build_llama
from multiexit_engine.models.t5 import build_t5
from multiexit_engine.quantization import Quantization

BUILDERS: dict[str, Callable[[ModelConfig, TensorLoader], MultiExitModel]] = {
    "gpt2": build_gpt2,
    "gpt_neo": build_gpt_neo,
    "llama": build_llama,
    "mistral": build_llama,
    "qwen2": build_llama,
    "qwen3": build_llama,
    "bart": build_bart,
    "t5": build_t5,
    "elmer": build_elmer,
}


def build_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> MultiExitModel:
    """The model of a checkpoint, its weights on ``device`` in ``dtype``.

    With ``quantization`` the matrices of products are quantized from the numbers as stored, one
    after the other; embeddings, norms and biases stay in ``dtype``.

    On the CPU, weights that are stored in ``dtype`` and in the layout that the model uses stay
    mapped from the file. The weights of exits are loaded by ``heads.require``.

    Raises:
        CheckpointError: an unsupported model type, or a tensor that is missing or misshapen.
    """
    config = checkpoint.config
    if config.model_type not in BUILDERS:
        raise CheckpointError(
            f"model_type {config.model_type!r} has no model; supported are {', '.join(BUILDERS)}"
        )
    loader = TensorLoader(checkpoint.weights, device, dtype, quantization)
    return BUILDERS[config.model_type](config, loader).eval()
