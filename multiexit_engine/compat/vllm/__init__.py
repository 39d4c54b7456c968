"""vLLM's scheduler and kernels under multi-exit checkpoints: the plug-in that vLLM loads.

Imports vLLM only when vLLM calls it.
"""

from __future__ import annotations

_PACKAGE = "multiexit_engine.compat.vllm"
# By the name in config.json's ``architectures``.
_MODELS = {
    "MultiExitGPT2": "gpt2",
    "MultiExitGPTNeo": "gpt_neo",
    "MultiExitLlama": "llama",
}


def register() -> None:
    """Make multi-exit models known to vLLM; what the entry point ``vllm.general_plugins`` names.

    vLLM calls it in each of its processes, and may do so more than once.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from multiexit_engine.compat.vllm.settings import MultiExitSettings

    for name, module in _MODELS.items():
        ModelRegistry.register_model(name, f"{_PACKAGE}.{module}:{name}")
        MODELS_CONFIG_MAP[name] = MultiExitSettings
