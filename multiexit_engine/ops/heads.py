"""Vocabulary heads: hidden states to logits. Knows nothing of exits or of contrast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multiexit_engine.ops.operands import is_plain, is_streamable
from multiexit_engine.ops.registry import register_op
from multiexit_engine.quantization import QuantizedWeight, Weight, as_tensor


@register_op
def head_logits(hidden: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Project hidden states on the vocabulary.

    A half-precision product is accumulated in float32 and stays so; only the reference on the CPU
    rounds it to the weights' dtype once.

    Args:
        hidden: [rows, hidden_size] normalised hidden states, any float dtype.
        weight: [vocab, hidden_size] of the same dtype and device, or quantized.
        bias: [vocab] added to every row's logits, or None.

    Returns:
        [rows, vocab] float32 logits (float64 for float64 inputs).

    Source: ``lm_head`` of every causal model in transformers.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(weight, QuantizedWeight):
        hidden, weight = hidden.to(dtype), as_tensor(weight, dtype)
    if hidden.device.type == "cuda" and hidden.dtype != dtype and hidden.shape[0]:
        logits = torch.mm(hidden, weight.T, out_dtype=dtype)
    else:
        logits = F.linear(hidden, weight).to(dtype)
    return logits if bias is None else logits + bias.to(dtype)


head_logits.backend(
    "cpu",
    "multiexit_engine._native:head_logits",
    device="cpu",
    supports=lambda hidden, weight, bias=None: is_plain(hidden, weight) and is_streamable(weight),
)
