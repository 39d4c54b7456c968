"""Self-speculation beside its target alone: the same tokens, or ties within rounding, counted.

python benchmarks/lossless.py --json results/lossless.json

For each model, backend and target 200 prompts are continued greedily by the target alone and, at
several batch sizes, by self-speculation. Counted are outputs that are not the same, with how far
apart the target's two best tokens were where they part, and all places where those two lie within
rounding of each other. On a vocabulary of eleven tokens thousands of sampled continuations are
compared with the target's exact distribution (chi-square).
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from agreement import ROUNDING, common_length
from report import show, write_json
from scipy.stats import chisquare
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from multiexit_engine import (
    Contrast,
    DecodingMode,
    Engine,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from multiexit_engine.params import parse_decoding

LAYERS, HIDDEN, HEADS, SPREAD = 6, 64, 4, 0.1
DRAFT_EXIT = 2
# what the layers above it add, as a share of what random ones would
ADDED_ABOVE = 0.4
FEW_TOKENS = 11
TEXTS = ("The old man looked at the sea and", "It was a dark night, and nobody", "She said that")


@dataclass
class Comparison:
    """What the outputs of one target gave in one engine."""

    model: str
    backend: str
    target: str
    batch: int
    draft_len: str
    prompts: int
    tokens: int
    different: int
    largest_gap_where_different: float | None
    ties_within_rounding: int
    drafted: int
    accepted: int


def random_model(family: str, vocab_size: int) -> PreTrainedModel:
    """A small model with random weights, of which the lower exits agree with the end at times."""
    torch.manual_seed(0)
    model = _model_of(family, vocab_size).eval()
    names = "attn.c_proj", "mlp.c_proj", "attn.attention.out_proj", "self_attn.o_proj", "mlp.down"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
            if layer >= DRAFT_EXIT and any(own in name for own in names):
                weight.mul_(ADDED_ABOVE)
    return model


def _model_of(family: str, vocab_size: int) -> PreTrainedModel:
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=HIDDEN,
                n_layer=LAYERS,
                n_head=HEADS,
                initializer_range=SPREAD,
                **ends,
            )
        )
    if family == "gpt_neo":
        return GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=vocab_size,
                hidden_size=HIDDEN,
                num_layers=LAYERS,
                num_heads=HEADS,
                attention_types=[[["global", "local"], LAYERS // 2]],
                window_size=16,
                initializer_range=SPREAD,
                **ends,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            initializer_range=SPREAD,
            **ends,
        )
    )


def open_engine(model: str, backend: str, folder: Path, vocab_size: int = 509) -> Engine:
    """The demo model, or a family's random weights with exits at layers 2 and 4."""
    if model == "demo":
        return Engine.from_pretrained("demo", dtype=torch.float32, backend=backend)
    target = folder / f"{model}-{vocab_size}"
    if not target.exists():
        random_model(model, vocab_size).save_pretrained(target)
    return Engine.from_pretrained(
        target,
        dtype=torch.float32,
        backend=backend,
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
        lm_head_layer_indices=[DRAFT_EXIT, 4, LAYERS],
    )


def prompts_of(engine: Engine, count: int) -> list[list[int]]:
    """Different prompts: the beginnings of sentences where the model knows any, else numbers."""
    draw = random.Random(count)
    size = engine.model_config.vocab_size
    starts = [engine.tokenizer(text)["input_ids"] for text in TEXTS] if engine.tokenizer else [[]]
    return [
        starts[i % len(starts)] + [draw.randrange(size) for _ in range(draw.randint(1, 24))]
        for i in range(count)
    ]


def targets(engine: Engine) -> dict[str, Original | Exit | Contrast]:
    """One of each kind, all above the exit that drafts, by their command-line forms."""
    upper = engine.model_config.num_layers - 2
    return {
        "original": Original(),
        f"exit:{upper}": Exit(upper),
        f"contrast:original,{upper},alpha=0.5": Contrast("original", upper, alpha=0.5),
    }


def continuations(
    engine: Engine, prompts: list[list[int]], new_tokens: int, mode: DecodingMode, batch: int
) -> list[list[int]]:
    """Greedy tokens, so many requests at once."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return [
        output.outputs[0].token_ids
        for start in range(0, len(prompts), batch)
        for output in engine.generate(prompts[start : start + batch], sampling, mode)
    ]


def gaps(engine: Engine, prompt: list[int], output: list[int], mode: DecodingMode) -> list[float]:
    """How far apart the two best log-probabilities are before each token of an output."""
    scores = engine.logits(prompt + output, mode)[len(prompt) - 1 : -1].log_softmax(-1)
    best = scores.topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


def compare(
    engine: Engine,
    names: tuple[str, str],
    count: int,
    new_tokens: int,
    batches: list[int],
    draft_lens: list[str],
) -> Iterator[Comparison]:
    """Every target, alone and speculated at every batch size."""
    model, backend = names
    prompts = prompts_of(engine, count)
    for name, target in targets(engine).items():
        expected = continuations(engine, prompts, new_tokens, target, 1)
        apart = [gaps(engine, *pair, target) for pair in zip(prompts, expected, strict=True)]
        ties = sum(gap < ROUNDING for own in apart for gap in own)
        for batch in batches:
            for length in ("plain", *draft_lens):
                mode: DecodingMode = target
                if length != "plain":
                    drafting = parse_decoding(f"self_speculative:{DRAFT_EXIT},{length}")
                    mode = replace(drafting, target=target)  # type: ignore[type-var]
                before = engine.stats()
                found = continuations(engine, prompts, new_tokens, mode, batch)
                after = engine.stats()
                parted = [
                    own[common_length(a, b)]
                    for a, b, own in zip(expected, found, apart, strict=True)
                    if a != b
                ]
                yield Comparison(
                    model,
                    backend,
                    name,
                    batch,
                    length,
                    count,
                    count * new_tokens,
                    len(parted),
                    max(parted, default=None),
                    ties,
                    after.num_drafted_tokens - before.num_drafted_tokens,
                    after.num_accepted_tokens - before.num_accepted_tokens,
                )


def sampled(engine: Engine, model: str, count: int) -> Iterator[dict[str, Any]]:
    """P-values of the second and third sampled token, given the first, in many requests."""
    for name, target in targets(engine).items():
        sampling = [
            SamplingParams(max_new_tokens=3, temperature=1.0, top_k=0, seed=i, ignore_eos=True)
            for i in range(count)
        ]
        mode = SelfSpeculative(DRAFT_EXIT, 2, target)
        outputs = engine.generate([[1, 2]] * count, sampling, mode)
        tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
        first = Counter(ids[0] for ids in tokens).most_common(1)[0][0]
        seen = Counter(ids[1:] for ids in tokens if ids[0] == first)
        p_value, cells = chi_square(seen, pair_shares(engine, [1, 2, first], target))
        yield {
            "model": model,
            "target": name,
            "continuations": sum(seen.values()),
            "drafted": sum(any(output.outputs[0].drafted) for output in outputs),
            "cells": cells,
            "p_value": round(p_value, 4),
        }


def pair_shares(
    engine: Engine, prefix: list[int], mode: DecodingMode
) -> dict[tuple[int, int], float]:
    """The exact probability of every pair of next tokens."""

    def next_shares(tokens: list[int]) -> list[float]:
        return engine.logits(tokens, mode)[-1].double().softmax(-1).tolist()

    return {
        (one, two): share * other
        for one, share in enumerate(next_shares(prefix))
        for two, other in enumerate(next_shares([*prefix, one]))
    }


def chi_square(
    seen: Counter[tuple[int, int]], shares: dict[tuple[int, int], float]
) -> tuple[float, int]:
    """The p-value, and of how many cells; pairs that are too rare for a cell share one."""
    total = sum(seen.values())
    common = [pair for pair, share in shares.items() if share * total >= 5]
    expected = [shares[pair] * total for pair in common]
    observed = [float(seen[pair]) for pair in common]
    expected.append(total - sum(expected))
    observed.append(total - sum(observed))
    if expected[-1] < 1e-6 * total:
        expected.pop()
        observed.pop()
    return float(chisquare(observed, expected, sum_check=False).pvalue), len(expected)


def main(
    model: Annotated[list[str] | None, typer.Option(help="demo, gpt2, gpt_neo, llama")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="native, reference")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="requests at once")] = None,
    draft_len: Annotated[
        list[str] | None, typer.Option(help="numbers or auto, with a tree: 3,tree=2;2")
    ] = None,
    prompts: int = 200,
    new_tokens: int = 32,
    samples: Annotated[
        int, typer.Option(help="sampled continuations; 0: none, else 1000 or more")
    ] = 20000,
    threads: int = 2,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Compare greedy tokens and sampled distributions; fails where rounding does not explain it."""
    if 0 < samples < 1000:
        raise typer.BadParameter(f"samples {samples}: 0, or at least 1000, which fill some cells")
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    draws: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for own in model or ["demo", "gpt2", "gpt_neo", "llama"]:
            for kind in backend or ["native", "reference"]:
                engine = open_engine(own, kind, Path(name))
                found = compare(
                    engine,
                    (own, kind),
                    prompts,
                    new_tokens,
                    batch or [1, 4, 16],
                    draft_len or ["3", "auto", "3,tree=2;2"],
                )
                rows += [asdict(row) for row in found]
            if own != "demo" and samples:
                draws += sampled(open_engine(own, "auto", Path(name), FEW_TOKENS), own, samples)
    columns = ["model", "backend", "target", "batch", "draft_len", "tokens", "different"]
    columns += ["largest_gap_where_different", "ties_within_rounding", "drafted", "accepted"]
    show("greedy", columns, [[str(row[column]) for column in columns] for row in rows])
    if draws:
        cells = [[str(value) for value in row.values()] for row in draws]
        show("sampled, vocabulary of 11", list(draws[0]), cells)
    write_json(json, rows, sampled=draws, rounding=ROUNDING)
    gap = max((row["largest_gap_where_different"] or 0.0 for row in rows), default=0.0)
    assert gap < ROUNDING, f"tokens differ where the target's two best are {gap} apart"
    assert all(row["p_value"] > 1e-4 for row in draws), "sampled tokens follow another distribution"


if __name__ == "__main__":
    typer.run(main)
