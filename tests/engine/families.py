"""One small model of each kind, the modes that it runs, and requests in all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from multiexit_engine import (
    Contrast,
    DoLa,
    EarlyExit,
    Engine,
    Exit,
    Original,
    Parallel,
    SamplingParams,
    SelfSpeculative,
)
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from tests.tiny import save_gpt2, save_probes

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCED = {"bart": GOLDEN / "elmer" / "t1", "t5": GOLDEN / "acd_t5" / "checkpoints" / "t5_layer"}
# thresholds that about half of the rows pass
EARLY_EXITS = [
    EarlyExit(0.3),
    EarlyExit(0.1, "margin"),
    EarlyExit(2.5, "entropy"),
    EarlyExit(0.85, "similarity"),
    EarlyExit(0.5, "probe"),
    EarlyExit(2.5, "entropy", shortlist=50),
    EarlyExit(0.1, "margin", layers=(4,), shortlist=200),
]
# exits that read the model's own head agree often, which those with heads of their own do not
PATIENT = [EarlyExit(2, "patience"), EarlyExit(0.85, "similarity"), EarlyExit(0.05, "margin")]
FIXED = [
    Original(),
    Exit(2),
    Exit(4),
    Contrast(6, 2),
    Contrast("original", 4, alpha=0.01),
    DoLa((0, 1, 3)),
    DoLa("high", mature=6, heads="raw"),
    DoLa((2, 4), relative_top=0.01, jsd="reference", mature=6, heads="exits"),
]
SPECULATIVE = [
    SelfSpeculative(2, 3),
    SelfSpeculative(4, "auto", Contrast(6, 2)),
    SelfSpeculative(2, 2, DoLa((0, 2, 4))),
    SelfSpeculative(2, 3, tree=(2, 3)),
]
WITH_SOURCES = [
    Original(),
    Exit(2),
    Contrast("original", 2),
    SelfSpeculative(1, draft_len=3),
    SelfSpeculative(2, draft_len=2, target=Contrast(4, 1)),
    DoLa((1, 2)),
    EarlyExit(0.4, layers=(1, 2, 3)),
    EarlyExit(0.4, layers=(1, 2, 3), kv="copy"),
    SelfSpeculative(2, draft_len=3, tree=(3, 2)),
]
PARALLEL = [
    Parallel("soft", length=11),
    Parallel("confidence", "max_prob", 0.4, length=1.5),
    Parallel("prescribed", layers=[1, 3, 2, 1, 1]),
    Parallel("confidence", "entropy", 2.0, layers=(2,), length=(7, 12)),
    Parallel(length=3, refine=2),
]


def with_copies(modes: list[EarlyExit]) -> list[EarlyExit]:
    return [replace(mode, kv=kv) for mode in modes for kv in ("recompute", "copy")]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        save: makes its checkpoint in an empty folder, or gives one that lies elsewhere.
        modes: that it runs.
        options: that its engines are opened with.
        num_tokens: of its vocabulary that prompts are drawn from, and the first of them.
    """

    save: Callable[[Path], Path]
    modes: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    num_tokens: tuple[int, int] = (0, 256)

    def open(self, folder: Path, **options: Any) -> Engine:
        own = {"dtype": "float32", "device": "cpu"}
        return Engine.from_pretrained(folder, **(own | self.options | options))


def save_probed(folder: Path) -> Path:
    return save_probes(save_gpt2(folder), (2, 4))


def with_source(name: str) -> Family:
    shared = {
        "architecture": name,
        "lm_head_layer_indices": (1, 2, 3, 4),
        "vocab_projection_mode": "SHARED_PROJECTION_DIRECT",
    }
    return Family(lambda _: SOURCED[name], WITH_SOURCES, shared, (3, 400))


FAMILIES = {
    "gpt2": Family(save_probed, [*FIXED, *with_copies(EARLY_EXITS), *SPECULATIVE]),
    "gpt2, shared head": Family(
        save_gpt2,
        [Original(), Exit(4), *with_copies(PATIENT), SelfSpeculative(2, 3)],
        {"vocab_projection_mode": "SHARED_PROJECTION_DIRECT"},
    ),
    "bart": with_source("bart"),
    "t5": with_source("t5"),
    "elmer": Family(lambda _: SOURCED["bart"], PARALLEL, num_tokens=(3, 399)),
}


def takes_beams(mode: Any) -> bool:
    return isinstance(mode, (Original, Exit, Contrast, DoLa))


def samplings(mode: Any, draw: random.Random) -> list[SamplingParams]:
    """Greedy, sampled twice, with penalties, and beams: what the mode takes of these."""
    if isinstance(mode, Parallel):
        return [SamplingParams(ignore_eos=True), SamplingParams(logprobs=1)]
    length = draw.randint(1, 24)
    found = [
        SamplingParams(max_new_tokens=length, confidences=False),
        SamplingParams(max_new_tokens=length, temperature=1.5, top_p=0.9, n=2, seed=length),
        SamplingParams(
            max_new_tokens=length,
            repetition_penalty=1.3,
            no_repeat_ngram_size=2,
            logprobs=2,
        ),
    ]
    return [*found, SamplingParams(max_new_tokens=length, num_beams=3)][: 3 + takes_beams(mode)]


def requests_of(family: Family, num_kinds: int = 4) -> list[tuple[list[int], SamplingParams, Any]]:
    """Prompt, sampling and mode of requests in every mode, some of them long."""
    draw, requests = random.Random(11), []
    for mode in family.modes:
        for sampling in samplings(mode, draw)[:num_kinds]:
            longest = 500 if len(requests) % 12 == 7 and family.num_tokens[0] == 0 else 60
            count = draw.randint(1, longest)
            prompt = [draw.randrange(*family.num_tokens) for _ in range(count)]
            requests.append((prompt, sampling, mode))
    return requests


def little_memory(engine: Engine, requests: list[tuple[list[int], SamplingParams, Any]]) -> int:
    """Bytes of a KV cache in which any of the requests can run, and few of them together."""
    config = engine.model_config
    shape = config.num_layers, 1, config.num_kv_heads, config.head_dim
    num_tokens = max(len(prompt) for prompt, _, _ in requests) + 260
    return num_tokens * PagedKVCache.bytes_per_block(*shape, torch.float32)
