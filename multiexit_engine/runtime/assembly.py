"""Puts together what runs requests of models that write one token after the other."""

from __future__ import annotations

from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.runtime.core import EngineCore
from multiexit_engine.runtime.detokenizer import Tokenizer
from multiexit_engine.runtime.draft_lengths import DraftLengths
from multiexit_engine.runtime.runner import ModelRunner
from multiexit_engine.runtime.scheduler import Scheduler


def autoregressive_core(
    config: EngineConfig, model: MultiExitModel, tokenizer: Tokenizer | None
) -> EngineCore:
    """A core with a scheduler, a runner and a KV cache of its own."""
    shape = model.config
    kv_cache = PagedKVCache(
        shape.num_layers,
        # one block that nobody owns, where the padding of decode steps writes
        config.num_kv_blocks + 1,
        config.block_size,
        shape.num_kv_heads,
        shape.head_dim,
        config.dtype,
        config.device,
    )
    draft_lengths = DraftLengths()
    runner = ModelRunner(model, kv_cache, config, draft_lengths)
    return EngineCore(config, Scheduler(config, draft_lengths), runner, tokenizer)
