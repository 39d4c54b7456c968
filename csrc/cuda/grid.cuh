// PTX by which the blocks of a grid hand each other what they wrote. host/grid.h models each of
// these functions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace multiexit::cuda {

// What other blocks have written: as L2 has it, which all of them share.
template <class T>
__device__ __forceinline__ T read_written(const T* place) {
  return __ldcg(place);
}

// Whoever reads the sum by `read_acquired` sees what this block wrote before it.
__device__ __forceinline__ void add_released(uint32_t* counter, uint32_t amount) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

__device__ __forceinline__ uint32_t read_acquired(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Has L2 fetch what will be read soon.
__device__ __forceinline__ void ask_ahead(const void* place) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
}

__device__ __forceinline__ void stop_kernel() { __trap(); }

}  // namespace multiexit::cuda
