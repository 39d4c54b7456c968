"""Which requests can never run, however empty the engine is.

Knows nothing of what runs at the moment.
"""

from __future__ import annotations

from multiexit_engine.config import EngineConfig
from multiexit_engine.request import Request


def check_fits(request: Request, config: EngineConfig) -> None:
    """Raise ValueError if the request has too many sequences or needs too many KV blocks."""
    sampling = request.sampling
    if request.width > config.max_batch_size:
        name = "num_beams" if request.is_beam_search else "n"
        raise ValueError(
            f"{name}={request.width}: must not exceed max_batch_size={config.max_batch_size}"
        )
    if request.is_beam_search and sampling.num_beams > config.max_num_batched_tokens:
        raise ValueError(
            f"num_beams={sampling.num_beams}: must not exceed "
            f"max_num_batched_tokens={config.max_num_batched_tokens}"
        )
    length = _longest(request, config)
    needed = -(-length // config.block_size) * sampling.num_beams
    num_source = len(request.source_token_ids)
    needed += -(-num_source // config.block_size)
    if needed > config.num_kv_blocks:
        raise ValueError(
            f"{length} tokens (prompt and output){_beside(num_source)} with "
            f"num_beams={sampling.num_beams} need {needed} KV blocks of "
            f"{config.block_size}: the cache has {config.num_kv_blocks}"
        )


def _beside(num_source: int) -> str:
    return f" beside a source of {num_source}" if num_source else ""


def _longest(request: Request, config: EngineConfig) -> int:
    num_prompt = len(request.prompt_token_ids)
    if request.score_from is not None:
        return num_prompt
    whole = num_prompt + request.sampling.max_new_tokens
    return max(num_prompt, min(whole, config.max_model_len))
