"""The whole engine on the GPU against itself on the CPU, on a small random model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.step_cases import CONDITIONAL, WAYS
from benchmarks.gpu.timing import DEVICE

PROMPTS = [[5, 9, 300, 7, 77], [1, 2, 3], list(range(40, 90)), [511]]
Ids = list[list[int]]


def cases(_: Card) -> Iterator[Case]:
    """Whether greedy ids agree in float32: kernels alone, captured, ahead, nodes passed over."""
    from multiexit_engine import Contrast, EarlyExit, Exit, Original, SelfSpeculative

    modes = {
        "original": Original(),
        "exit": Exit(2),
        "contrast": Contrast(4, 2, alpha=0.1),
        "3 drafts": SelfSpeculative(2, 3),
        "early exit": EarlyExit(0.5),
        "early exit, copied": EarlyExit(0.9, "similarity", kv="copy"),
    }
    ways = {"kernels": {"backend": "native"}} if DEVICE == "cuda" else {"python": {}}
    for way in ("graphs", "graphs, ahead"):
        if WAYS[way]:
            ways[way] = {"backend": "native"} | WAYS[way]
    if any(CONDITIONAL.values()):
        ways["graphs, conditional nodes"] = ways["graphs"] | CONDITIONAL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save(folder)
        reference = Once(partial(_engine, folder, "cpu", {}))
        expected = {name: Once(partial(_ids, reference, mode)) for name, mode in modes.items()}
        for way, options in ways.items():
            engine = Once(partial(_engine, folder, DEVICE, options))
            for name, mode in modes.items():
                label = {"way": way, "mode": name}
                yield Case(label, partial(_agree, engine, mode, expected[name]))
            engine.forget()


def _save(folder: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=128, vocab_size=512, n_positions=256, initializer_range=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def _engine(folder: Path, device: str, options: dict[str, Any]) -> Any:
    from multiexit_engine import Engine

    return Engine.from_pretrained(
        folder,
        device=device,
        dtype="float32",
        vocab_projection_mode="shared_projection_direct",
        lm_head_layer_indices=(2, 4),
        **options,
    )


def _ids(engine: Once[Any], mode: Any) -> Ids:
    from multiexit_engine import SamplingParams

    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    outputs = engine().generate(PROMPTS, sampling, decoding=mode, progress=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _agree(engine: Once[Any], mode: Any, expected: Once[Ids]) -> dict[str, str]:
    found = _ids(engine, mode)
    return {"ids": "equal" if found == expected() else f"differ: {found} for {expected()}"}
