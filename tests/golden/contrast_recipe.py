"""Regenerates the inputs of the golden contrast cases; contrast/manifest.json has their sha256.

numpy's RandomState streams are frozen across versions.
"""

import numpy as np


def make_inputs(kind, batch, vocab, seed, dtype):
    """Upper and lower logits [batch, vocab]; bfloat16 as float32 arrays of such values."""
    random = np.random.RandomState(seed)
    noise = random.standard_normal((batch, vocab))
    other = random.standard_normal((batch, vocab))
    upper, lower = KINDS[kind](random, noise, other)
    if dtype == "bfloat16":
        return _round_to_bfloat16(upper), _round_to_bfloat16(lower)
    return upper.astype(dtype), lower.astype(dtype)


def _gauss(random, noise, other):
    upper = 3.0 * noise
    return upper, 0.7 * upper + 2.0 * other


def _peaky(random, noise, other):
    """A handful of strong tokens on a gaussian floor."""
    batch, vocab = noise.shape
    upper = 2.0 * noise
    places = random.randint(0, vocab, size=(batch, 12))
    boost = 5.0 + 5.0 * random.random_sample((batch, 12))
    lower = 0.6 * upper + 1.5 * other
    for i in range(batch):
        upper[i, places[i]] += boost[i]
        lower[i, places[i]] += 0.8 * boost[i] + random.standard_normal(12)
    return upper, lower


def _gpt2ish(random, noise, other):
    """Raw GPT-2 logits live around -30 to -120."""
    upper = 2.8 * noise - 93.0
    return upper, 2.0 * other + 0.5 * (upper + 93.0) - 61.0


def _onehot(random, noise, other):
    """One token holds nearly everything: a single candidate."""
    batch, vocab = noise.shape
    upper, lower = 2.0 * noise, 2.0 * other
    upper[np.arange(batch), random.randint(0, vocab, size=batch)] += 40.0
    return upper, lower


def _masked(random, noise, other):
    """A padded vocabulary: -inf on the same tail of both."""
    upper, lower = _gauss(random, noise, other)
    count = max(1, noise.shape[1] // 50)
    upper[:, -count:] = -np.inf
    lower[:, -count:] = -np.inf
    return upper, lower


def _masked_upper(random, noise, other):
    upper, lower = _gauss(random, noise, other)
    upper[:, : max(1, noise.shape[1] // 50)] = -np.inf
    return upper, lower


KINDS = {
    "gauss": _gauss,
    "peaky": _peaky,
    "gpt2ish": _gpt2ish,
    "wide": lambda random, noise, other: (25.0 * noise, 25.0 * other),
    "lowerwide": lambda random, noise, other: (2.0 * noise, 60.0 * other),
    "ties": lambda random, noise, other: (np.round(2 * noise) / 2, np.round(2 * other) / 2),
    "flat": lambda random, noise, other: (0.3 * noise, 0.3 * other),
    "equal": lambda random, noise, other: (3.0 * noise, 3.0 * noise),
    "onehot": _onehot,
    "masked": _masked,
    "masked_upper": _masked_upper,
}


def _round_to_bfloat16(values):
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)
