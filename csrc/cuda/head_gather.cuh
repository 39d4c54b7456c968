// The lower head of a contrast: only the rows of tokens that may be plausible are read.
#pragma once
#include "cuda/head_task.cuh"
#include "cuda/product.cuh"

namespace multiexit::cuda {

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
  uint32_t first_place = 0;  // used when the first products are done
  if (lane == 0)
    first_place = atomicAdd(&task.kept->scored[row], static_cast<uint32_t>(__popc(waiting)));
  for (int done = 0; waiting; done += kGroup) {
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
    const uint32_t place = __shfl_sync(~0u, first_place, 0) + done + member;
    if (lane % (kLanes / kGroup) == 0 && member < __popc(waiting))
      scored[place] = {logit, logit - lower, token};
    for (int i = 0; i < kGroup; ++i) waiting &= waiting - 1;
  }
}

// Goes through the block's candidates of a row: those that fell behind take part in the draw with
// their own logit, the others are scored.
template <class Number>
__device__ __forceinline__ void gather_row(const HeadTask& task, Shared& shared, Share share,
                                           int row) {
  const int warp = threadIdx.x / kLanes, count = shared.listed[row];
  const float limit = from_ordered(shared.top[row]) + task.log_alpha(row);
  const Draw draw = task.draw(row);
  Best best = Best::none();
  for (int start = warp * kLanes; start < count; start += kThreads) {
    const int index = start + threadIdx.x % kLanes;
    Candidate own = {-infinity(), 0};
    if (index < count) own = candidate(task, shared, share, row, index);
    const bool keeps = index < count && own.logit >= limit;
    if (index < count && !keeps && draw.temperature > 0.0f)
      best = best.merged({draw.key(own.logit, own.token), own.logit, own.token});
    const uint32_t waiting = __ballot_sync(~0u, keeps);
    if (waiting) score<Number>(task, row, own, waiting);
  }
  if (draw.temperature > 0.0f) {
    best = merged_in_warp(best);
    Best& others = shared.partials[warp][row].best;
    if (threadIdx.x % kLanes == 0) others = others.merged(best);
  }
}

}  // namespace multiexit::cuda
