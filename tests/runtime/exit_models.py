"""Models whose rows choose their exit, and how what they gave is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from multiexit_engine import Engine, RequestOutput
from tests.tiny import save_gpt2, save_probes


def own_heads(folder: Path) -> Path:
    """Each exit with a matrix of its own over the vocabulary, and probes."""
    return save_probes(save_gpt2(folder, num_heads=2), (2, 4))


def shared_head(folder: Path) -> Path:
    """Exits with matrices of their own between their states and the model's head, and probes."""
    folder = save_gpt2(folder, num_heads=2)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name in [name for name in tensors if "lm_exit_head" in name]:
        layer = int(name.split("_")[-1].split(".")[0])
        if layer < 6:
            cast = torch.eye(64) * 3 + torch.randn(64, 64, generator=generator) * 0.3
            tensors[f"name_to_conv_matrix.{layer}_to_6.weight"] = cast
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_projection_mode"] = "SHARED_PROJECTION_CAST_OUTPUTS"
    (folder / "config.json").write_text(json.dumps(config))
    return save_probes(folder, (2, 4))


def assert_same(found: list[RequestOutput], wanted: list[RequestOutput]) -> None:
    """The same tokens, exits and ranks; log-probabilities and confidences up to rounding."""
    pairs = zip(found, wanted, strict=True)
    for one, other in ((a.outputs[0], b.outputs[0]) for a, b in pairs):
        assert one.finish_reason == other.finish_reason
        assert (one.token_ids, one.exit_layers) == (other.token_ids, other.exit_layers)
        assert one.confidences == pytest.approx(other.confidences, abs=1e-5, nan_ok=True)
        for told, wanted_of in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert [*told] == [*wanted_of]
            for name, logprob in told.items():
                assert logprob.rank == wanted_of[name].rank
                assert logprob.logprob == pytest.approx(wanted_of[name].logprob, abs=1e-5)


def exits(outputs: list[RequestOutput]) -> set[int]:
    return {layer for output in outputs for layer in output.outputs[0].exit_layers}


def are_launched(engine: Engine) -> list[bool]:
    """A list that says of each step whether the device decided in it."""
    runner, found = engine._core.runner, []
    launch = runner.launch

    def noted(batch, before=None):
        step = launch(batch, before)
        found.append(step is not None)
        return step

    runner.launch = noted
    return found
