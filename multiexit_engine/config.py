"""What is fixed when an engine starts: the model's shape and the engine's own limits.

Knows nothing of files, tensors' contents or requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal

import torch

from multiexit_engine.quantization import Quantization

BackendName = Literal["auto", "reference", "native"]


class VocabularyProjectionMode(Enum):
    """How the hidden state of an exit becomes logits (IBM's names).

    With ``z_k`` the output of block k after the model's final norm and N the last layer:

    * LAYER_SPECIFIC_PROJECTION: ``z_k @ lm_head_k.T``, a matrix for every exit, N included;
    * SHARED_PROJECTION_CAST_OUTPUTS: ``(z_k @ matrix_k_to_N.T) @ lm_head.T`` for k < N, and the
      model's own head for N;
    * SHARED_PROJECTION_DIRECT: ``z_k @ lm_head.T``, which needs no extra weights.

    Source: ``VocabularyProjectionMode`` and ``MultiExitMixin`` of IBM's autocontrastive-gen.
    """

    LAYER_SPECIFIC_PROJECTION = "layer_specific_projection"
    SHARED_PROJECTION_CAST_OUTPUTS = "shared_projection_cast_outputs"
    SHARED_PROJECTION_DIRECT = "shared_projection_direct"

    @classmethod
    def parse(cls, value: str | VocabularyProjectionMode) -> VocabularyProjectionMode:
        """A mode from itself or from its name in any case; raises ValueError otherwise."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        allowed = ", ".join(cls.__members__)
        raise ValueError(f"vocab_projection_mode={value!r}: allowed are {allowed}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, worked out when the checkpoint is read.

    Attributes:
        kind: transformers' ``rope_type``.
        inv_freq: float32 values, radians per position for each pair of a head: head_dim / 2.
        attention_scaling: factor of both cosine and sine.
    """

    kind: str
    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder of a model that has one, and how its decoder begins.

    Attributes:
        num_layers: its blocks.
        num_heads: attention heads of its blocks.
        head_dim: width of one of them.
        max_source_len: longest source, in tokens.
        decoder_start_token_id: first token of every decoder sequence; None when the checkpoint
            names none.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    max_source_len: int
    decoder_start_token_id: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, the same words for every family.

    Attributes:
        model_type: transformers' name of the family ("gpt2", "gpt_neo", "llama", ...).
        vocab_size: rows of the token embedding and of every head.
        hidden_size: width of the residual stream.
        num_layers: number of blocks; exits are numbered 1..num_layers.
        num_heads: query heads.
        num_kv_heads: key and value heads (GQA when fewer than num_heads).
        head_dim: width of one head.
        max_position_embeddings: longest sequence the checkpoint was made for, in tokens.
        attention_windows: for each layer the number of last keys a query sees, itself included;
            None for all of them.
        tie_word_embeddings: the head is the token embedding.
        exit_layers: 1-based layers that have exits, ascending; empty for a single-exit model.
        projection: how exits project; None when there are no exits.
        bos_token_id: first token of a text, if the model has one.
        eos_token_ids: tokens that end a text; may be empty.
        pad_token_id: token for padding, if the model has one.
        forced_bos_token_id: what the first token of every output has to be, if anything.
        forced_eos_token_id: what the last token of an output of full length has to be, if anything.
        rope: rotary positions; None for a model with a table of positions.
        encoder: what reads the source; None for a decoder-only model.
        family: the checkpoint's config as transformers reads it, for the model's own file only.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    attention_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    exit_layers: tuple[int, ...] = ()
    projection: VocabularyProjectionMode | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    rope: RopeConfig | None = None
    encoder: EncoderConfig | None = None
    family: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class EngineConfig:
    """The limits of one engine.

    Attributes:
        device: where weights and cache live.
        dtype: of weights, activations and cache.
        backend: which implementations of the ops may run.
        max_model_len: longest sequence, prompt and output together, in tokens.
        max_batch_size: most sequences that run at once.
        max_num_batched_tokens: most tokens of one step; longer prompts are cut into chunks.
        block_size: tokens of one KV block.
        num_kv_blocks: blocks of the pool.
        prefix_caching: reuse the KV blocks of equal beginnings.
        seed: of requests that bring none.
        quantization: of the weight matrices; None for ``dtype``.
        cuda_graphs: numbers of rows that decode steps are captured for; none: they run from Python.
        async_scheduling: launch a step before the tokens of the last one are known.
        conditional_nodes: captured layers are passed over on the device where nobody is left.
        persistent_blocks: spans of layers run in one launch for few rows.
    """

    device: torch.device
    dtype: torch.dtype
    backend: BackendName
    max_model_len: int
    max_batch_size: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_blocks: int
    prefix_caching: bool
    seed: int
    quantization: Quantization | None = None
    cuda_graphs: tuple[int, ...] = ()
    async_scheduling: bool = False
    conditional_nodes: bool = False
    persistent_blocks: bool = False
