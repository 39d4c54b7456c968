// Tokens straight from hidden states of a few rows: the vocabulary heads, the contrast and the
// choice, in one launch that reads the upper head once.
//
// Every block reads a share of the head; the last to finish chooses. Results are the same in each
// run: what blocks race for is only which tokens are looked at more closely.
#pragma once
#include "cuda/head_finish.cuh"
#include "cuda/head_gather.cuh"
#include "cuda/head_stream.cuh"

namespace multiexit::cuda {

template <int ROWS>
__device__ __forceinline__ void load_hidden(const HeadTask& task, char* hidden) {
  const int bytes = task.weight.bytes;
  for (int row = 0; row < ROWS; ++row)
    for (int byte = threadIdx.x * 16; byte < bytes; byte += kThreads * 16) {
      const int64_t place = static_cast<int64_t>(row) * bytes + byte;
      const uint4 none = {0, 0, 0, 0};
      *reinterpret_cast<uint4*>(hidden + place) =
          row < task.rows ? *reinterpret_cast<const uint4*>(task.hidden + place) : none;
    }
}

template <class Number, int ROWS, bool CONTRAST>
__global__ void __launch_bounds__(kThreads, 1) head_tokens_kernel(const HeadTask task) {
  char* memory = dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  char* hidden = memory + kSharedBytes;
  const Rows& matrix = task.weight;
  const int warp = threadIdx.x / kLanes;
  char* slots = hidden + ROWS * matrix.bytes + warp * kSlots * kGroup * task.piece;
  Ring ring(slots, shared.transfers[warp], task.piece);
  const Share share = Share::of_this_block(matrix.count);

  // Weights do not depend on the kernel before this one: they are on their way when it ends.
  const Place start = {share.first + warp};
  Place ahead = start;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (ahead.group < share.stop) {
      ahead.fill(ring, matrix, task.piece);
      ahead.advance(matrix.bytes, task.piece, kWarps);
    } else {
      ring.fill_nothing();
    }
  }
  wait_for_previous_kernel();
  load_hidden<ROWS>(task, hidden);
  if (threadIdx.x < kMostRows) {
    shared.top[threadIdx.x] = ordered(-infinity());
    shared.listed[threadIdx.x] = 0;
  }
  __syncthreads();

  stream_head<Number, ROWS, CONTRAST>(task, shared, ring, hidden, share, start, ahead);
  let_next_kernel_start();
  __syncthreads();
  const int row = threadIdx.x;
  if (CONTRAST) {
    for (int each = 0; each < task.rows; ++each) gather_row<Number>(task, shared, share, each);
    __syncthreads();
  }
  if (row < task.rows) publish_partial(task, shared, row);
  if (!finishes_last(task, shared)) return;

  for (int each = 0; each < task.rows; ++each) finish_row<CONTRAST>(task, shared, each);
  __syncthreads();
  if (threadIdx.x == 0) *task.kept = {};
}

}  // namespace multiexit::cuda
