// What is known of a row after a part of the vocabulary, and how two parts become one.
#pragma once
#include <cstring>

#include "cuda/noise.cuh"
#include "cuda/numbers.cuh"
#include "cuda/ring.cuh"

namespace multiexit::cuda {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * kLanes;
constexpr int kNoToken = 2147483647;

// The largest of some logits, and the sum of exp(logit - top).
struct Softmax {
  float top, total;

  static __device__ __forceinline__ Softmax none() { return {-infinity(), 0.0f}; }

  // NaN, and +inf, make the total NaN in the end; -inf is a token that cannot be.
  __device__ __forceinline__ void add(float logit) {
    if (logit > top) {
      total = total * expf(top - logit) + 1.0f;
      top = logit;
    } else if (logit != -infinity()) {
      total += expf(logit - top);
    }
  }
  __device__ __forceinline__ Softmax merged(const Softmax& other) const {
    if (other.total == 0.0f) return *this;
    if (total == 0.0f) return other;
    const float most = fmaxf(top, other.top);
    return {most, total * expf(top - most) + other.total * expf(other.top - most)};
  }
};

// The token with the largest key, of equals the lowest, and its logit.
struct Best {
  float key, value;
  int token;

  static __device__ __forceinline__ Best none() { return {-infinity(), -infinity(), kNoToken}; }

  __device__ __forceinline__ Best merged(const Best& other) const {
    return other.key > key || (other.key == key && other.token < token) ? other : *this;
  }
};

// Sums in units of 2^-40, so that their order does not matter.
struct Sums {
  long long mass, score, count;

  static __device__ __forceinline__ long long units(float share) {
    return static_cast<long long>(share * 0x1p40f);
  }
  __device__ __forceinline__ Sums merged(const Sums& other) const {
    return {mass + other.mass, score + other.score, count + other.count};
  }
};

// How a row's token is drawn.
struct Draw {
  float temperature;
  uint64_t seed;
  uint32_t position;

  __device__ __forceinline__ float key(float logit, int token) const {
    return temperature > 0.0f ? logit / temperature + gumbel(seed, position, token) : logit;
  }
};

template <class T>
__device__ __forceinline__ T from_lane_xor(const T& value, int mask) {
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(~0u, words[i], mask);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// Of all lanes; those that a result depends on merge in the same order each time.
template <class T>
__device__ __forceinline__ T merged_in_warp(T value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) value = value.merged(from_lane_xor(value, mask));
  return value;
}

// Of all threads of the block, which all get it; `room` is for one value of each warp.
template <class T>
__device__ __forceinline__ T merged_in_block(T value, T* room) {
  value = merged_in_warp(value);
  if (threadIdx.x % kLanes == 0) room[threadIdx.x / kLanes] = value;
  __syncthreads();
  T result = room[0];
  for (int warp = 1; warp < kWarps; ++warp) result = result.merged(room[warp]);
  __syncthreads();
  return result;
}

}  // namespace multiexit::cuda
