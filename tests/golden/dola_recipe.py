"""Makes the checkpoints of the golden DoLa cases; the same bytes everywhere.

numpy's RandomState streams are frozen across versions.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCAB, HIDDEN, HEADS = 211, 32, 4
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32"}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GPT2 = COMMON | {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_positions": 128,
}
CONFIGS = {
    "gpt2_tied": GPT2 | {"n_layer": 8},
    "gpt2_untied": GPT2 | {"n_layer": 5, "tie_word_embeddings": False},
    "llama_untied": LLAMA | {"num_hidden_layers": 8, "tie_word_embeddings": False},
    "llama_tied": LLAMA | {"num_hidden_layers": 7, "tie_word_embeddings": True},
}
SEEDS = {"gpt2_tied": 1, "gpt2_untied": 2, "llama_untied": 3, "llama_tied": 4}


def save_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint whose logits are far from flat at every layer, and far from each other's."""
    config = CONFIGS[name]
    random = np.random.RandomState(SEEDS[name])
    shapes = _gpt2_shapes(config) if config["model_type"] == "gpt2" else _llama_shapes(config)
    tensors = {tensor: _values(random, tensor, shape) for tensor, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _values(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = random.standard_normal(shape)
    if "norm" in name or ".ln_" in name:
        return (1.0 + 0.1 * noise if name.endswith("weight") else 0.1 * noise).astype(np.float32)
    scale = 0.1 if name.endswith("bias") else 0.6 if len(shape) == 2 else 1.0
    return (scale * noise / (1.0 if shape[0] == VOCAB else 3.0)).astype(np.float32)


def _gpt2_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.wpe.weight": (config["n_positions"], HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,),
        "transformer.ln_f.bias": (HIDDEN,),
    }
    linears = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4}
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.{part}": (HIDDEN,) for part in ("weight", "bias")}
        for linear, factor in linears.items():
            shapes[f"{block}.{linear}.weight"] = (HIDDEN, factor * HIDDEN)
            shapes[f"{block}.{linear}.bias"] = (factor * HIDDEN,)
        shapes[f"{block}.mlp.c_proj.weight"] = (4 * HIDDEN, HIDDEN)
        shapes[f"{block}.mlp.c_proj.bias"] = (HIDDEN,)
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def _llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * config["num_key_value_heads"]
    inner = config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (HIDDEN,),
            f"{block}.post_attention_layernorm.weight": (HIDDEN,),
            f"{block}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{block}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{block}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.mlp.gate_proj.weight": (inner, HIDDEN),
            f"{block}.mlp.up_proj.weight": (inner, HIDDEN),
            f"{block}.mlp.down_proj.weight": (HIDDEN, inner),
        }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes
