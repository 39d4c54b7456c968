// Products of matrix rows and hidden states, summed in an order that knows neither how many rows
// of hidden states there are nor in how many pieces a row came.
#pragma once
#include "cuda/numbers.cuh"
#include "cuda/ring.cuh"

namespace multiexit::cuda {

// sums[member * ROWS + row] += this lane's share of the products of kGroup pieces of weights with
// ROWS pieces of hidden states, which lie `hidden_bytes` apart. Pieces are whole 16-byte chunks.
template <class Number, int ROWS>
__device__ __forceinline__ void multiply(const char* const (&weights)[kGroup], const char* hidden,
                                         int hidden_bytes, int bytes,
                                         float (&sums)[kGroup * ROWS]) {
#pragma unroll 2
  for (int byte = threadIdx.x % kLanes * 16; byte < bytes; byte += kLanes * 16) {
    uint4 chunks[kGroup];
#pragma unroll
    for (int member = 0; member < kGroup; ++member)
      chunks[member] = *reinterpret_cast<const uint4*>(weights[member] + byte);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const uint4 states = *reinterpret_cast<const uint4*>(hidden + row * hidden_bytes + byte);
#pragma unroll
      for (int member = 0; member < kGroup; ++member) {
        float& sum = sums[member * ROWS + row];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const float2 w = Number::widen((&chunks[member].x)[word]);
          const float2 h = Number::widen((&states.x)[word]);
          sum = fmaf(w.x, h.x, sum);
          sum = fmaf(w.y, h.y, sum);
        }
      }
    }
  }
}

// One step of `totals`: lanes at a distance exchange halves of COUNT values.
template <int COUNT>
__device__ __forceinline__ void exchange_halves(float* values, int distance) {
  const bool keeps_upper = threadIdx.x & distance;
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) {
    const float kept = keeps_upper ? values[i + COUNT / 2] : values[i];
    const float given = keeps_upper ? values[i] : values[i + COUNT / 2];
    values[i] = kept + __shfl_xor_sync(~0u, given, distance);
  }
}

// The sum over all lanes of each of COUNT values: lane l gets that of value l / (32 / COUNT).
//
// It takes COUNT + log2(32 / COUNT) exchanges where a sum for each value would take 5 COUNT. Every
// value is added up in the same order, whatever COUNT is.
template <int COUNT>
__device__ __forceinline__ float totals(float (&values)[COUNT]) {
  static_assert(COUNT == 4 || COUNT == 8 || COUNT == 16, "the steps are written out");
  if constexpr (COUNT == 16) exchange_halves<16>(values, 16);
  if constexpr (COUNT >= 8) exchange_halves<8>(values, 128 / COUNT);
  exchange_halves<4>(values, 64 / COUNT);
  exchange_halves<2>(values, 32 / COUNT);
#pragma unroll
  for (int distance = 16 / COUNT; distance > 0; distance /= 2)
    values[0] += __shfl_xor_sync(~0u, values[0], distance);
  return values[0];
}

}  // namespace multiexit::cuda
