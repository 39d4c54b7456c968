"""Bytes that a decode step must read, and the speed that they allow.

Counted are the matrices, biases and norms of the layers that run, one head, and the keys and values
of the context: each once. Not counted: one row of each embedding, and the lower head's rows of a
contrast's plausible tokens (some twenty).
"""

from __future__ import annotations

from checkpoints import Shape
from transformers import GPTNeoConfig

# with a scale of two bytes for every 32 codes, as in the engine and in llama.cpp's Q8_0
BYTES_OF_A_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "int8": 34 / 32, "int4": 18 / 32}
BYTES_OF_A_KEY = {"float32": 4, "bfloat16": 2, "int8": 2, "int4": 2}


def weights_of_step(shape: Shape, layers: int) -> int:
    """Numbers in ``layers`` decoder blocks, the final norm, and one head."""
    width = shape.config.hidden_size
    qkv_bias = 0 if isinstance(shape.config, GPTNeoConfig) else 3 * width
    # attention 4 w^2, feed-forward 8 w^2; biases: output w, up 4 w, down w; two norms 4 w
    block = 12 * width**2 + 10 * width + qkv_bias
    return layers * block + 2 * width + shape.config.vocab_size * width


def step_bytes(shape: Shape, layers: int, weights: str, context: float) -> float:
    """Bytes of one token of one sequence with ``context`` tokens before it."""
    keys_and_values = 2 * layers * shape.config.hidden_size * context
    return (
        weights_of_step(shape, layers) * BYTES_OF_A_WEIGHT[weights]
        + keys_and_values * BYTES_OF_A_KEY[weights]
    )


def mean_context(prompt_len: int, new_tokens: int) -> float:
    """Average number of cached tokens over the decode steps after the prompt's own step."""
    return prompt_len + new_tokens / 2
