// What the C interfaces share: how a call may be wrong, and how its numbers are read.
#pragma once
#ifdef MULTIEXIT_ON_HOST
#include "cuda/host/launch.h"
#else
#include "cuda/launch.cuh"
#endif

namespace multiexit::cuda {

// Not CUDA's errors, which are above 0. multiexit_cuda_error explains them.
enum Error : int {
  kRows = -1,
  kShape = -2,
  kNumbers = -3,
  kAddress = -4,
  kTooWide = -5,
  kOld = -6,
  kLayerShape = -7
};

constexpr int kMostRows = 4;  // of hidden states in a launch

// How many rows the kernel for some rows is made for.
constexpr int kernel_rows(int64_t rows) {
  return rows <= 2 ? static_cast<int>(rows) : kMostRows;
}

constexpr int64_t rounded_up(int64_t bytes, int64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace multiexit::cuda
