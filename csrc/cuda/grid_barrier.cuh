// A barrier of all blocks of a grid, which must be on the device together.
#pragma once
#include "cuda/target.cuh"

namespace multiexit::cuda {

// Zero between launches, so that a replayed graph needs no node to fill it.
struct GridCounters {
  uint32_t arrived, finished;
};

class GridBarrier {
 public:
  __device__ __forceinline__ explicit GridBarrier(GridCounters* counters) : counters_(counters) {}

  // By all threads. What the block wrote before is seen by who has waited.
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) add_released(&counters_->arrived, 1);
    expected_ += gridDim.x;
  }

  // By all threads, for all blocks to arrive. Between the two there is time for what nobody writes.
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
#ifdef MULTIEXIT_BOUNDED_SPIN
      for (uint32_t looks = 0; read_acquired(&counters_->arrived) < expected_; ++looks)
        if (looks == MULTIEXIT_BOUNDED_SPIN) stop_kernel();
#else
      while (read_acquired(&counters_->arrived) < expected_) {
      }
#endif
    }
    __syncthreads();
  }

  // By all threads, behind the last wait: the last block to come here restores the counters.
  __device__ __forceinline__ void finish() {
    if (threadIdx.x == 0 && atomicAdd(&counters_->finished, 1u) == gridDim.x - 1) *counters_ = {};
  }

 private:
  GridCounters* counters_;
  uint32_t expected_ = 0;
};

}  // namespace multiexit::cuda
