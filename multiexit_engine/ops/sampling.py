"""Random choice of tokens that is the same in every batch, on every device and in any order.

Noise is a function of (seed, position, token id) alone, so a kernel may draw it tile by tile and a
reference may draw it for a few tokens only. Knows nothing of temperatures or penalties.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multiexit_engine.ops.operands import is_streamable
from multiexit_engine.ops.registry import register_op

# Below this share of finite scores the CPU draws noise for those alone.
SPARSE_SHARE = 0.25

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """First output word of Philox-4x32-10.

    Args:
        counter: four words, int64 tensors of values in [0, 2**32) that broadcast together.
        key: two words of the same kind.

    Returns:
        int64 values in [0, 2**32), of the broadcast shape.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products reach 2**64: they wrap, and shifting fills with the sign, but the low half and
        # the masked high half are still those of the unsigned product.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> 32 & _MASK) ^ c1 ^ k0, second & _MASK
        c2, c3 = (first >> 32 & _MASK) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0


@register_op
def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor | int) -> Tensor:
    """Standard Gumbel noise for tokens, reproducible from the arguments.

    With x the first word of Philox-4x32-10 under the key ``seed`` (low half first) and the counter
    ``(token id, position, 0, 0)``, and v = (x + 0.5) / 2**32 in float32, at most 1 - 2**-24, the
    noise is ``-log(-log1p(-v))``: it lies in [-2.82, 22.88] and is finest where it is large, which
    is where winners are decided. Triton's ``tl.randint(seed, (position << 32) + token_id)`` is x.

    Args:
        seeds: [rows] int64, any value.
        positions: [rows] int64 in [0, 2**31).
        token_ids: [tokens] int64 in [0, 2**31) for all rows, or [rows, tokens]; or the size of the
            vocabulary, for all its tokens.

    Returns:
        [rows, tokens] float32.

    Source: Salmon et al. 2011 (Philox); Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030.
    """
    if isinstance(token_ids, int):
        token_ids = torch.arange(token_ids, device=seeds.device)
    tokens = token_ids if token_ids.dim() == 2 else token_ids[None]
    seed, position = seeds[:, None], positions[:, None]
    zero = torch.zeros_like(position)
    bits = philox((tokens, position, zero, zero), (seed & _MASK, seed >> 32 & _MASK))
    v = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -(-(-v.clamp(max=1 - 2.0**-24)).log1p()).log()


@register_op
def sample_tokens(scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one token for each row from the softmax of its scores.

    The token is the argmax of scores plus ``gumbel_noise``, the lowest id among equals: the same
    for equal arguments, whatever the other rows hold. A score of -inf is never drawn unless a row
    has nothing else, which gives token 0.

    Args:
        scores: [rows, vocab] float32, processed and divided by the temperature.
        seeds: [rows] int64.
        positions: [rows] int64, different for each token that one seed draws.

    Returns:
        [rows] int64 token ids.

    Source: Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030.
    """
    if scores.device.type == "cpu":
        rows, tokens = (scores > -math.inf).nonzero(as_tuple=True)
        if tokens.shape[0] <= SPARSE_SHARE * scores.numel():
            noise = gumbel_noise(seeds[rows], positions[rows], tokens[:, None])[:, 0]
            noisy = scores.clone()
            noisy[rows, tokens] += noise
            return noisy.argmax(-1)
    return (scores + gumbel_noise(seeds, positions, scores.shape[1])).argmax(-1)


sample_tokens.backend(
    "cpu",
    "multiexit_engine._native:sample_tokens",
    device="cpu",
    supports=lambda scores, *_: scores.dtype is torch.float32 and is_streamable(scores),
)
