"""Puts together what runs the requests of a model, one token after the other or all at once."""

from __future__ import annotations

from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.config import EngineConfig
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.runtime.core import EngineCore
from multiexit_engine.runtime.device.graph_parts import new_capture
from multiexit_engine.runtime.device.graphs import Graphs
from multiexit_engine.runtime.device.persistent import run_in_one_launch
from multiexit_engine.runtime.parallel.answer_memory import AnswerMemory
from multiexit_engine.runtime.parallel.answer_pieces import AnswerPieces
from multiexit_engine.runtime.parallel.parallel_core import ParallelCore
from multiexit_engine.runtime.requests.detokenizer import Tokenizer
from multiexit_engine.runtime.runner import ModelRunner
from multiexit_engine.runtime.scheduling.draft_lengths import DraftLengths
from multiexit_engine.runtime.scheduling.scheduler import Scheduler

# tokens of a batch of short sources that a pass is captured for, whatever the longest one may have
SHORT_SOURCES = 1024


def autoregressive_core(
    config: EngineConfig, model: MultiExitModel, tokenizer: Tokenizer | None
) -> EngineCore:
    """A core with a scheduler, a runner and a KV cache of its own.

    Raises ValueError for ``persistent_blocks`` of a model whose blocks are not served.
    """
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
    if config.persistent_blocks:
        run_in_one_launch(model, config.block_size)
    draft_lengths = DraftLengths()
    runner = ModelRunner(model, kv_cache, config, draft_lengths)
    return EngineCore(config, Scheduler(config, draft_lengths), runner, tokenizer)


def parallel_core(
    config: EngineConfig, model: ElmerModel, tokenizer: Tokenizer | None
) -> ParallelCore:
    """A core for answers in one piece, with memory for captured passes where they are asked for."""
    if not config.cuda_graphs:
        return ParallelCore(config, model, tokenizer)
    most_tokens = max(config.max_model_len, SHORT_SOURCES)
    graphs = Graphs(config.cuda_graphs, most_tokens, new_capture(config))
    memory = AnswerMemory(
        graphs.sizes[-1],
        graphs.bounds[-1],
        config.max_batch_size,
        model.config,
        config.dtype,
        config.device,
    )
    return ParallelCore(config, model, tokenizer, AnswerPieces(model, memory, graphs))
