"""Tiny random checkpoints of transformers, and our models run over a cache laid out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from multiexit_engine.batch import ForwardBatch, ScheduledBatch, ScheduledSequence
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.models import MultiExitModel
from multiexit_engine.params import Original, SamplingParams
from multiexit_engine.request import Request, Sequence

CPU = torch.device("cpu")
NUM_LAYERS, VOCAB = 4, 101

LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_LIKE = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": NUM_LAYERS,
    "n_head": 6,
    "n_positions": 64,
}
GPT_NEO_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_layers": NUM_LAYERS,
    "num_heads": 6,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 5,
}
ROPE = {"rope_theta": 500.0}

CASES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", GPT2_LIKE),
    "gpt2 with every switch": (
        "gpt2",
        {
            **GPT2_LIKE,
            "n_inner": 40,
            "activation_function": "relu",
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "layer_norm_epsilon": 1e-2,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neo": ("gpt_neo", GPT_NEO_LIKE),
    "gpt_neo in another pattern": (
        "gpt_neo",
        {
            **GPT_NEO_LIKE,
            "attention_types": [[["local"], 1], [["global", "local", "local"], 1]],
            "window_size": 3,
            "intermediate_size": 40,
            "activation_function": "gelu",
        },
    ),
    "llama": ("llama", LLAMA_LIKE),
    "llama with biases, wide heads, tied": (
        "llama",
        {
            **LLAMA_LIKE,
            "head_dim": 12,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
    ),
    "llama linear": (
        "llama",
        {**LLAMA_LIKE, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 3.0}},
    ),
    "llama dynamic": (
        "llama",
        {**LLAMA_LIKE, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 3.0}},
    ),
    "llama yarn": (
        "llama",
        {
            **LLAMA_LIKE,
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama 3": (
        "llama",
        {
            **LLAMA_LIKE,
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("mistral", {**LLAMA_LIKE, "sliding_window": 5}),
    "mistral without a window": ("mistral", {**LLAMA_LIKE, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen2 with windows": (
        "qwen2",
        {**LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {**LLAMA_LIKE, "head_dim": 12}),
    "qwen3 with biases": ("qwen3", {**LLAMA_LIKE, "head_dim": 12, "attention_bias": True}),
}


BART = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 56,
    "max_position_embeddings": 40,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 4,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "decoder_start_token_id": 0,
}
ENCODER_DECODERS: dict[str, tuple[str, dict]] = {
    "bart": ("bart", BART),
    "bart with every switch": (
        "bart",
        {
            **BART,
            "scale_embedding": True,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
    ),
    "t5": ("t5", T5),
    "t5 gated and untied": (
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def transformers_model(model_type: str, values: dict) -> transformers.PreTrainedModel:
    """A seeded model whose every parameter, norms and biases too, differs from its default."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def expected_taps(model: transformers.PreTrainedModel, token_ids: list[int]) -> list[Tensor]:
    """Raw outputs of the blocks 1..N, each [tokens, hidden]."""
    blocks = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    outputs: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(
            (output[0] if isinstance(output, tuple) else output).view(len(token_ids), -1)
        )

    hooks = [block.register_forward_hook(keep) for block in blocks]
    with torch.inference_mode():
        model(torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    return outputs


def expected_logits(model: transformers.PreTrainedModel, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


@dataclass(frozen=True)
class Cache:
    """A paged cache with scrambled blocks, NaN wherever nothing was written."""

    kv_cache: PagedKVCache
    sequences: list[Sequence]

    @classmethod
    def for_texts(cls, model: MultiExitModel, texts: list[list[int]], block_size: int) -> Cache:
        counts = [-(-len(text) // block_size) for text in texts]
        config = model.config
        kv_cache = PagedKVCache(
            config.num_layers,
            sum(counts) + 3,
            block_size,
            config.num_kv_heads,
            config.head_dim,
            next(model.parameters()).dtype,
            CPU,
        )
        for layer in range(config.num_layers):
            kv_cache.key(layer).fill_(float("nan"))
            kv_cache.value(layer).fill_(float("nan"))
        order = iter(torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(2)))
        sequences = [
            _sequence(text, [int(next(order)) for _ in range(count)])
            for text, count in zip(texts, counts, strict=True)
        ]
        return cls(kv_cache, sequences)


def _sequence(token_ids: list[int], block_table: list[int]) -> Sequence:
    request = Request("r", token_ids, SamplingParams(), Original(), NUM_LAYERS, seed=0)
    return Sequence(request, 0, token_ids, block_table=block_table)


def forward_batch(cache: Cache, spans: list[tuple[int, int]]) -> ForwardBatch:
    scheduled = ScheduledBatch(
        tuple(
            ScheduledSequence(sequence, start, stop - start)
            for sequence, (start, stop) in zip(cache.sequences, spans, strict=True)
        )
    )
    return ForwardBatch.build(scheduled, cache.kv_cache.block_size, CPU)


def run_step(
    model: MultiExitModel, cache: Cache, spans: list[tuple[int, int]]
) -> list[list[Tensor]]:
    """Taps 1..N of tokens ``start..stop`` of each sequence: ``[layer][sequence]``."""
    batch = forward_batch(cache, spans)
    lens = list(batch.layout.query_lens)
    taps = []
    with torch.inference_mode():
        hidden = model.embed(batch.token_ids, batch.positions)
        for layer in range(model.config.num_layers):
            hidden = model.run_layers(hidden, layer, layer + 1, cache.kv_cache, batch)
            taps.append(list(hidden.split(lens)))
    return taps


def run_text(
    model: MultiExitModel, token_ids: list[int], chunk: int, block_size: int = 4
) -> list[Tensor]:
    """Taps 1..N of a text that is computed ``chunk`` tokens at a time."""
    cache = Cache.for_texts(model, [token_ids], block_size)
    steps = [
        run_step(model, cache, [(start, min(start + chunk, len(token_ids)))])
        for start in range(0, len(token_ids), chunk)
    ]
    return [torch.cat([step[k][0] for step in steps]) for k in range(model.config.num_layers)]


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, atol=tolerance * scale, rtol=0)
