// Gumbel noise of ops/sampling.py: a function of seed, position and token alone.
#pragma once
#include "cuda/target.cuh"

namespace multiexit::cuda {

// First word of Philox-4x32-10 (Salmon et al. 2011) of the counter (token, position, 0, 0).
__device__ __forceinline__ uint32_t philox(uint64_t seed, uint32_t position, uint32_t token) {
  uint32_t c0 = token, c1 = position, c2 = 0, c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), high1 = __umulhi(c2, 0xCD9E8D57u);
    const uint32_t low0 = c0 * 0xD2511F53u, low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
}

__device__ __forceinline__ float gumbel(uint64_t seed, uint32_t position, uint32_t token) {
  const uint32_t word = philox(seed, position, token);
  const float v = fminf((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  return -logf(-log1pf(-v));
}

}  // namespace multiexit::cuda
