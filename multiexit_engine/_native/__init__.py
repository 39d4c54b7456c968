"""Tensor-level front of the C++ extension ``multiexit_engine._C`` (built from csrc/).

Backends of the ops, found by name: the contract of each stands in ``multiexit_engine.ops``.
Importing this raises ImportError where the extension was not built.
"""

from multiexit_engine._native.attention import biased_paged_attention, paged_attention
from multiexit_engine._native.blocks import decoder_blocks, packed_blocks
from multiexit_engine._native.coded_heads import (
    code_hidden,
    coded_head_tokens,
    rough_head_sums,
)
from multiexit_engine._native.dense import (
    gate_odds,
    layer_norm,
    linear,
    linear_activation,
    rms_norm,
)
from multiexit_engine._native.dola import dola_tokens, js_divergences
from multiexit_engine._native.heads import (
    contrast_heads,
    contrast_tokens,
    head_logits,
    head_statistics,
    head_tokens,
    sample_tokens,
    shared_head_tokens,
)
from multiexit_engine._native.packed_attention import biased_packed_attention, packed_attention
from multiexit_engine._native.rows import embed, take_rows

__all__ = [
    "biased_packed_attention",
    "biased_paged_attention",
    "code_hidden",
    "coded_head_tokens",
    "contrast_heads",
    "contrast_tokens",
    "decoder_blocks",
    "dola_tokens",
    "embed",
    "gate_odds",
    "head_logits",
    "head_statistics",
    "head_tokens",
    "js_divergences",
    "layer_norm",
    "linear",
    "linear_activation",
    "packed_attention",
    "packed_blocks",
    "paged_attention",
    "rms_norm",
    "rough_head_sums",
    "sample_tokens",
    "shared_head_tokens",
    "take_rows",
]
