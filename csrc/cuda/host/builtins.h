// The words of CUDA C++ that the kernels use, for fibers.
#pragma once
#include <cmath>

#include "cuda/host/fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Aligned as a GPU wants them.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct __half2 {
  uint16_t low, high;
};
struct __nv_bfloat162 {
  uint16_t low, high;
};

namespace multiexit::host {

struct Index {
  unsigned x;
};
inline Index thread_index() { return {Machine::get().current->thread}; }
inline Index block_index() { return {Machine::get().current->block->index}; }
inline Index grid_size() { return {Machine::get().num_blocks}; }

inline Warp& own_warp() {
  Fiber& self = *Machine::get().current;
  return self.block->warps[self.thread / kWarpSize];
}

inline float widened(uint16_t half) {
  _Float16 number;
  memcpy(&number, &half, 2);
  return number;
}

inline uint16_t half_of(float number) {
  const auto half = static_cast<_Float16>(number);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

inline uint16_t bfloat16_of(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  if (number != number) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace multiexit::host

#define threadIdx (multiexit::host::thread_index())
#define blockIdx (multiexit::host::block_index())
#define gridDim (multiexit::host::grid_size())

using std::max;
using std::min;

inline void __syncthreads() {
  auto& machine = multiexit::host::Machine::get();
  machine.meet(machine.current->block->all, machine.current->block->alive);
}

inline void __syncwarp() {
  auto& warp = multiexit::host::own_warp();
  multiexit::host::Machine::get().meet(warp.all, warp.alive);
}

inline void __threadfence() {}

namespace multiexit::host {

// Calls `read` with a function that gives the value of any lane.
template <class T, class Read>
auto exchange(const T& value, Read&& read) {
  Warp& warp = own_warp();
  memcpy(&warp.exchanged[threadIdx.x % kWarpSize], &value, sizeof(T));
  __syncwarp();
  const auto result = read([&](int lane) {
    T other;
    memcpy(&other, &warp.exchanged[lane], sizeof(T));
    return other;
  });
  __syncwarp();
  return result;
}

}  // namespace multiexit::host

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return multiexit::host::exchange(value, [&](auto&& of_lane) { return of_lane(source); });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  return multiexit::host::exchange(vote, [&](auto&& of_lane) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned{of_lane(lane)} << lane;
    return bits;
  });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
}

template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  return before;
}

template <class T>
T atomicMax(T* place, T value) {
  const T before = *place;
  *place = std::max(before, value);
  return before;
}

inline uint32_t __float_as_uint(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float number;
  memcpy(&number, &bits, 4);
  return number;
}
inline float2 __half22float2(const __half2& pair) {
  return {multiexit::host::widened(pair.low), multiexit::host::widened(pair.high)};
}

inline __half2 __floats2half2_rn(float first, float second) {
  return {multiexit::host::half_of(first), multiexit::host::half_of(second)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float first, float second) {
  return {multiexit::host::bfloat16_of(first), multiexit::host::bfloat16_of(second)};
}
inline float rsqrtf(float number) { return 1.0f / sqrtf(number); }

namespace multiexit::cuda {

inline char* dynamic_shared() { return host::Machine::get().current->block->shared; }

}  // namespace multiexit::cuda
