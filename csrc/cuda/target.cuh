// What the kernels are compiled for: a GPU, or the model of one that runs on CPU fibers in tests.
#pragma once

#ifdef MULTIEXIT_ON_HOST
#include "cuda/host/builtins.h"
#include "cuda/host/copies.h"
#include "cuda/host/grid.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/copies.cuh"
#include "cuda/grid.cuh"

namespace multiexit::cuda {

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

}  // namespace multiexit::cuda
#endif
