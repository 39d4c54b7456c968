"""Writes a GPT-2 checkpoint as GGUF, the file that llama.cpp reads.

Matrices and the token embedding have the asked type, vectors and positions stay float32, as in
llama.cpp's own files. The vocabulary is made of names: prompts are token ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(model: Path, target: Path, weights: str) -> None:
    """Write ``target`` from the folder of a float32 checkpoint."""
    config = json.loads((model / "config.json").read_text())
    kind, file_type = TYPES[weights]
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_file_type(file_type)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    names = [f"t{token}" for token in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(len(names) - 1)
    for name, tensor in load_file(model / "model.safetensors").items():
        is_matrix = tensor.ndim == 2 and not name.endswith("wpe.weight")
        if is_matrix and ".h." in name:
            tensor = np.ascontiguousarray(tensor.T)  # GPT-2 keeps its matrices as [in, out]
        used = kind if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(tensor, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    part, kind = name.removeprefix("transformer.").rsplit(".", 1)
    if not part.startswith("h."):
        return {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}[
            part
        ] + f".{kind}"
    _, layer, block_part = part.split(".", 2)
    return f"blk.{layer}.{BLOCK_NAMES[block_part]}.{kind}"
