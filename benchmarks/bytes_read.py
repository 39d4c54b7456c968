"""Bytes that a decode step must read, and the speed that they allow.

Counted are the matrices, biases and norms of the layers that run, one head, and the keys and values
of the context: each once. Of a head that is read by its codes only these count. Not counted: one
row of each embedding, the lower head's rows of a contrast's plausible tokens (some twenty), and the
rows of tokens that codes cannot tell from the best one (some tens).
"""

from __future__ import annotations

import torch
from checkpoints import Shape

from multiexit_engine.layers.rough_heads import LEAST_NUMBERS
from multiexit_engine.ops import are_codes_fast

# with a scale of two bytes for every 32 codes, as in the engine and in llama.cpp's Q8_0
BYTES_OF_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "int8": 34 / 32, "int4": 18 / 32}
BYTES_OF_A_KEY = {"float32": 4, "bfloat16": 2, "int8": 2, "int4": 2}
# a scale, an error, and the sum of the codes
BYTES_OF_A_CODED_ROW = 12


def weights_of_step(shape: Shape, layers: int) -> int:
    """Numbers in ``layers`` decoder blocks, the final norm, and one head."""
    with torch.device("meta"):
        decoder = shape.model_class(shape.config).base_model
    parts = dict(decoder.named_children())
    block, norm = (
        sum(tensor.numel() for tensor in part.parameters())
        for part in (parts.get("h", parts.get("layers"))[0], parts.get("ln_f", parts.get("norm")))
    )
    return layers * block + norm + shape.config.vocab_size * shape.config.hidden_size


def has_codes(shape: Shape, weights: str, backend: str) -> bool:
    """Whether the engine reads a head by its codes."""
    size = shape.config.vocab_size * shape.config.hidden_size
    is_used = weights in ("float32", "bfloat16") and backend != "reference"
    return is_used and size >= LEAST_NUMBERS and are_codes_fast()


def step_bytes(
    shape: Shape, layers: int, weights: str, context: float, *, by_codes: bool = False
) -> float:
    """Bytes of one token of one sequence with ``context`` tokens before it."""
    heads = shape.config.num_attention_heads
    width = shape.config.hidden_size // heads * getattr(shape.config, "num_key_value_heads", heads)
    keys_and_values = 2 * layers * width * context
    vocab, hidden = shape.config.vocab_size, shape.config.hidden_size
    found = (
        weights_of_step(shape, layers) * BYTES_OF_A_WEIGHT[weights]
        + keys_and_values * BYTES_OF_A_KEY[weights]
    )
    if by_codes:
        found += vocab * (hidden + BYTES_OF_A_CODED_ROW - hidden * BYTES_OF_A_WEIGHT[weights])
    return found


def mean_context(prompt_len: int, new_tokens: int) -> float:
    """Average number of cached tokens over the decode steps after the prompt's own step."""
    return prompt_len + new_tokens / 2
