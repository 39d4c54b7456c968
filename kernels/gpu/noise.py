"""Random numbers inside kernels: the same bits as ``ops.sampling`` draws."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, position, token):
    """``ops.gumbel_noise`` of a seed and position, int64, and a token id, whatever the tiling."""
    token = token.to(tl.uint32)
    position = (position & 0x7FFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, token, position, token * 0, token * 0)
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2**-32, 1.0 - 2**-24)
    # The logarithm of numbers near 1 is exact to 2^-22 only, but small v are those that win.
    near = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    return -tl.log(tl.where(v < 0.0625, near, -tl.log(1 - v)))
