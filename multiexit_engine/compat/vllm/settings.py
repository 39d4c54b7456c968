"""What vLLM settles before it loads a multi-exit model: the exits, and who follows the requests."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

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
        if vllm_config.use_v2_model_runner:
            raise ValueError(
                "the multi-exit plug-in follows requests through vLLM's model runner V1; set "
                "VLLM_USE_V2_MODEL_RUNNER=0"
            )
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config: multi-exit models inside vLLM run without it")
        if vllm_config.lora_config is not None:
            raise ValueError("enable_lora: multi-exit models inside vLLM run without it")
        is_pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
        if is_pipeline and model.enforce_eager and current_platform.is_cpu():
            # Only its run before compiling makes the room in which a stage gets its input.
            raise ValueError(
                "pipeline_parallel_size: on the CPU vLLM runs pipelines compiled only; leave out "
                "enforce_eager"
            )
        if vllm_config.parallel_config._api_process_count > 1:
            # The others would not know the exits, and let requests in that end the engine.
            raise ValueError("api_server_count: multi-exit models inside vLLM take one")
        RowModes.model = exits
        others = [name for name in model.logits_processors or () if name != ROW_MODES]
        model.logits_processors = [*others, ROW_MODES]
