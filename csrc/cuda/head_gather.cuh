// The lower head of a contrast: only the rows of tokens that may be plausible are read.
#pragma once
#include "cuda/head_task.cuh"
#include "cuda/product.cuh"

namespace multiexit::cuda {

// By one thread for each row, when the block has read its share of the upper head.
__device__ __forceinline__ void publish_top(const HeadTask& task, Shared& shared, int row) {
  atomicMax(&task.kept->top[row], shared.top[row]);
  const uint32_t top = *static_cast<volatile uint32_t*>(&task.kept->top[row]);
  shared.limit[row] = from_ordered(top) + task.log_alpha(row);
}

// The lane of the n-th bit that is set, or the first one's where there are not so many.
__device__ __forceinline__ int nth_lane(uint32_t bits, int n) {
  uint32_t rest = bits;
  for (int i = 0; i < n; ++i) rest &= rest - 1;
  return __ffs(rest ? rest : bits) - 1;
}

// Scores the candidates of the warp's lanes that `waiting` has set, kGroup at a time.
template <class Number>
__device__ __forceinline__ void score(const HeadTask& task, int row, const Candidate& own,
                                      uint32_t waiting) {
  const int lane = threadIdx.x % kLanes, member = lane / (kLanes / kGroup);
  const Rows& matrix = task.weight;
  const char* hidden = task.lower_hidden + static_cast<int64_t>(row) * matrix.bytes;
  Scored* scored = task.scored + static_cast<int64_t>(row) * matrix.count;
  uint32_t place = 0;
  if (lane == 0) place = atomicAdd(&task.kept->scored[row], static_cast<uint32_t>(__popc(waiting)));
  place = __shfl_sync(~0u, place, 0);
  while (waiting) {
    const char* weights[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int token = __shfl_sync(~0u, own.token, nth_lane(waiting, i));
      weights[i] = task.lower_weight + static_cast<int64_t>(token) * matrix.bytes;
    }
    float sums[kGroup] = {};
    multiply<Number, 1>(weights, hidden, matrix.bytes, matrix.bytes, sums);
    const float lower = totals(sums);
    const int source = nth_lane(waiting, member);
    const float logit = __shfl_sync(~0u, own.logit, source);
    const int token = __shfl_sync(~0u, own.token, source);
    const int count = min(kGroup, __popc(waiting));
    if (lane % (kLanes / kGroup) == 0 && member < count)
      scored[place + member] = {logit, logit - lower, token};
    place += count;
    for (int i = 0; i < count; ++i) waiting &= waiting - 1;
  }
}

// Goes through the block's candidates of a row: those that fell behind take part in the draw with
// their own logit, the others are scored.
template <class Number>
__device__ __forceinline__ void gather_row(const HeadTask& task, Shared& shared, Share share,
                                           int row) {
  const int warp = threadIdx.x / kLanes, count = shared.listed[row];
  const float limit = shared.limit[row];
  const Draw draw = task.draw(row);
  const Candidate* listed =
      task.candidates + static_cast<int64_t>(row) * task.weight.count + share.first_token();
  Best best = Best::none();
  for (int start = warp * kLanes; start < count; start += kThreads) {
    const int index = start + threadIdx.x % kLanes;
    const Candidate own = index < count ? listed[index] : Candidate{-infinity(), 0};
    const bool keeps = index < count && own.logit >= limit;
    if (index < count && !keeps && draw.temperature > 0.0f)
      best = best.merged({draw.key(own.logit, own.token), own.logit, own.token});
    const uint32_t waiting = __ballot_sync(~0u, keeps);
    if (waiting) score<Number>(task, row, own, waiting);
  }
  if (draw.temperature > 0.0f) {
    best = merged_in_warp(best);
    if (threadIdx.x % kLanes == 0) shared.best[warp][row] = shared.best[warp][row].merged(best);
  }
}

}  // namespace multiexit::cuda
