"""The whole engine on the GPU against itself on the CPU, on a small random model."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.gpu.timing import DEVICE

PROMPTS = [[5, 9, 300, 7, 77], [1, 2, 3], list(range(40, 90)), [511]]


def measure() -> dict[str, Any]:
    """Whether greedy ids of some modes agree in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from multiexit_engine import Contrast, EarlyExit, Engine, Exit, Original, SamplingParams

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=128, vocab_size=512, n_positions=256, initializer_range=0.3
    )
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    modes = {
        "original": Original(),
        "exit": Exit(2),
        "contrast": Contrast(4, 2, alpha=0.1),
        "early exit": EarlyExit(0.5),
        "early exit, copied": EarlyExit(0.9, "similarity", kv="copy"),
    }
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).save_pretrained(folder)
        engines = {
            device: Engine.from_pretrained(
                folder,
                device=device,
                dtype="float32",
                vocab_projection_mode="shared_projection_direct",
                lm_head_layer_indices=(2, 4),
            )
            for device in ("cpu", DEVICE)
        }
        return {name: _agree(engines, sampling, mode) for name, mode in modes.items()}


def _agree(engines: dict[str, Any], sampling: Any, mode: Any) -> str:
    ids = {
        device: [
            list(output.outputs[0].token_ids)
            for output in engine.generate(PROMPTS, sampling, decoding=mode)
        ]
        for device, engine in engines.items()
    }
    return "equal" if ids["cpu"] == ids[DEVICE] else f"differ: {ids}"
