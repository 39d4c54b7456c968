"""What vLLM settles before it loads a multi-exit model: the exits, and who follows the requests."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from multiexit_engine.compat.vllm.request_modes import read_exits
from multiexit_engine.compat.vllm.row_modes import RowModes

ROW_MODES = "multiexit_engine.compat.vllm.row_modes:RowModes"


class MultiExitSettings(VerifyAndUpdateConfig):  # type: ignore[misc]
    """Called by vLLM in the process that takes requests."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Have the modes of the requests followed.

        Raises:
            ValueError: the config states no exits, or vLLM is set to what hides the requests'
                modes from the model.
        """
        model = vllm_config.model_config
        exits = read_exits(model.hf_config.model_type, model.hf_config.to_dict())
        if not model.enforce_eager:
            # Compiled (vLLM 0.32.0, torch 2.13, CPU), the last layer's states came out wrong.
            raise ValueError("multi-exit models inside vLLM run uncompiled: set enforce_eager=True")
        if vllm_config.use_v2_model_runner:
            raise ValueError(
                "the multi-exit plug-in follows requests through vLLM's model runner V1; set "
                "VLLM_USE_V2_MODEL_RUNNER=0"
            )
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config: multi-exit models inside vLLM run without it")
        if vllm_config.parallel_config._api_process_count > 1:
            # The others would not know the exits, and let requests in that end the engine.
            raise ValueError("api_server_count: multi-exit models inside vLLM take one")
        RowModes.model = exits
        others = [name for name in model.logits_processors or () if name != ROW_MODES]
        model.logits_processors = [*others, ROW_MODES]
