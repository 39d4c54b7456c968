"""vLLM's scheduler and kernels under multi-exit checkpoints: the plug-in that vLLM loads.

Imports vLLM only when vLLM calls it.
"""

from __future__ import annotations

_PACKAGE = "multiexit_engine.compat.vllm"


def register() -> None:
    """Make multi-exit GPT-2 known to vLLM; what the entry point ``vllm.general_plugins`` names.

    vLLM calls it in each of its processes, and may do so more than once.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from multiexit_engine.compat.vllm.settings import MultiExitSettings

    ModelRegistry.register_model("MultiExitGPT2", f"{_PACKAGE}.gpt2:MultiExitGPT2")
    MODELS_CONFIG_MAP["MultiExitGPT2"] = MultiExitSettings
