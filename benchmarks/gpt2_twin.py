"""The checkpoint's original model as a plain GPT-2, for peers that know no exits and no GPT-Neo.

A GPT-Neo of up to 256 positions is a GPT-2: its attention is not scaled (queries times the root of
the head's width, a power of two for 64, undo GPT-2's scale without rounding), its query, key and
value have no bias (zeros), its matrices lie transposed, and no local window is reached yet.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from checkpoints import Shape
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPTNeoConfig

MAX_POSITIONS = 256


def make_gpt2_twin(shape: Shape, checkpoint: Path) -> Path:
    """The folder of the twin beside ``checkpoint``, in its dtype; made if it is not there.

    Its config has no end of text, so that nothing that reads it may stop early or avoid a token.
    """
    target = checkpoint.with_name(f"{checkpoint.name}-gpt2")
    if (target / "config.json").exists():
        return target
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys() if n.startswith("transformer.")}  # noqa: SIM118
    source = shape.config
    if isinstance(source, GPTNeoConfig):
        tensors = gpt2_tensors(source, tensors)
    config = GPT2Config(
        vocab_size=source.vocab_size,
        n_positions=min(source.max_position_embeddings, MAX_POSITIONS),
        n_embd=source.hidden_size,
        n_layer=source.num_layers if isinstance(source, GPTNeoConfig) else source.n_layer,
        n_head=source.num_heads if isinstance(source, GPTNeoConfig) else source.n_head,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["GPT2LMHeadModel"],
        dtype=next(iter(tensors.values())).dtype,
    )
    positions = tensors["transformer.wpe.weight"]
    tensors["transformer.wpe.weight"] = positions[: config.n_positions].contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config.save_pretrained(target)
    return target


def gpt2_tensors(config: GPTNeoConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-Neo's tensors under GPT-2's names, in its layout [in, out]; exact for heads of 4**k."""
    scale = math.sqrt(config.hidden_size // config.num_heads)
    found = {name: tensor for name, tensor in tensors.items() if ".h." not in name}
    for layer in range(config.num_layers):
        block = f"transformer.h.{layer}"
        for part in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            for kind in ("weight", "bias"):
                found[f"{block}.{part}.{kind}"] = tensors[f"{block}.{part}.{kind}"]
        for part in ("mlp.c_fc", "mlp.c_proj"):
            found[f"{block}.{part}.weight"] = found[f"{block}.{part}.weight"].T.contiguous()
        attention = f"{block}.attn.attention"
        query, key, value = (tensors[f"{attention}.{part}_proj.weight"] for part in "qkv")
        qkv = torch.cat([query * scale, key, value]).T.contiguous()
        found[f"{block}.attn.c_attn.weight"] = qkv
        found[f"{block}.attn.c_attn.bias"] = qkv.new_zeros(qkv.shape[1])
        output = tensors[f"{attention}.out_proj.weight"].T.contiguous()
        found[f"{block}.attn.c_proj.weight"] = output
        found[f"{block}.attn.c_proj.bias"] = tensors[f"{attention}.out_proj.bias"]
    return found
