"""Writes and reads checkpoint folders: config, weights and tokenizer as transformers lays them out.

It knows files. It does not know how the weights were trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.train.corpus import END_OF_TEXT
from multiexit_engine.train.exits import MultiExitNetwork

_ARCHITECTURES = {"gpt2": "MultiExitGPT2", "gpt_neo": "MultiExitGPTNeo", "llama": "MultiExitLlama"}


def write_folder(
    network: MultiExitNetwork, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype
) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.checkpoint_state(dtype), folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", _model_config(network, dtype))
    end = tokenizer.token_to_id(END_OF_TEXT)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(network))


def read_network(folder: Path) -> MultiExitNetwork:
    """The network of a folder that `write_folder` made, in fp32; raises if a weight is missing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network = MultiExitNetwork(
        decoder,
        VocabularyProjectionMode.parse(config["vocab_projection_mode"]),
        config["lm_head_layer_indices"],
    )
    weights = load_file(folder / "model.safetensors")
    heads = {name: weights[name].float() for name in network.heads.state_dict()}
    network.heads.load_state_dict(heads)
    return network.eval()


def _model_config(network: MultiExitNetwork, dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = network.decoder.config.to_diff_dict()
    model_type = network.decoder.config.model_type
    return config | {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES.get(model_type, type(network.decoder).__name__)],
        "dtype": str(dtype).removeprefix("torch."),
        "lm_head_layer_indices": list(reversed(network.layers)),
        "vocab_projection_mode": network.heads.mode.name,
    }


def _tokenizer_config(network: MultiExitNetwork) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": network.decoder.config.max_position_embeddings,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
