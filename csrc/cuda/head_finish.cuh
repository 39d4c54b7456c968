// The last half, by the block that finishes last: from the results of all blocks to one token and
// its log-probability.
#pragma once
#include "cuda/head_task.cuh"

namespace multiexit::cuda {

// By one thread for each row: the block's statistics, its warps in order.
__device__ __forceinline__ void publish_partial(const HeadTask& task, const Shared& shared,
                                                int row) {
  Partial partial = {shared.softmax[0][row], shared.best[0][row]};
  for (int warp = 1; warp < kWarps; ++warp) {
    partial.softmax = partial.softmax.merged(shared.softmax[warp][row]);
    partial.best = partial.best.merged(shared.best[warp][row]);
  }
  task.partials[static_cast<int64_t>(row) * gridDim.x + blockIdx.x] = partial;
}

// Whether all other blocks have published what they found. The same for all threads.
__device__ __forceinline__ bool finishes_last(const HeadTask& task, Shared& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.is_last = atomicAdd(&task.kept->blocks_done, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return shared.is_last;
}

__device__ __forceinline__ Partial merged_partials(const HeadTask& task, Shared& shared, int row) {
  Partial own = {Softmax::none(), Best::none()};
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const Partial& part = task.partials[static_cast<int64_t>(row) * gridDim.x + block];
    own = {own.softmax.merged(part.softmax), own.best.merged(part.best)};
  }
  return {merged_in_block(own.softmax, &shared.softmax[0][0]),
          merged_in_block(own.best, &shared.best[0][0])};
}

// The best of the scored tokens, with the final threshold, and of the tokens below it.
//
// With the largest logit known, every scored token is either plausible or not; plausible ones share
// their mass in proportion to exp(score).
__device__ __forceinline__ Best contrast_best(const HeadTask& task, Shared& shared, int row,
                                              float top, const Best& others) {
  const int count = *static_cast<volatile uint32_t*>(&task.kept->scored[row]);
  const float threshold = top + task.log_alpha(row);
  const Draw draw = task.draw(row);
  const Scored* scored = task.scored + static_cast<int64_t>(row) * task.weight.count;
  Best best = Best::none();
  for (int i = threadIdx.x; i < count; i += kThreads)
    if (scored[i].logit >= threshold)
      best = best.merged({scored[i].score, scored[i].score, scored[i].token});
  best = merged_in_block(best, &shared.best[0][0]);

  Sums sums = {0, 0, 0};
  for (int i = threadIdx.x; i < count; i += kThreads)
    if (scored[i].logit >= threshold)
      sums = sums.merged({Sums::units(expf(scored[i].logit - top)),
                          Sums::units(expf(scored[i].score - best.key)), 1});
  sums = merged_in_block(sums, shared.sums);
  if (task.num_candidates && threadIdx.x == 0)
    task.num_candidates[row] = static_cast<int>(sums.count);
  // What turns the score of a plausible token into a logit of the contrasted distribution.
  const float shift = top - best.key + logf(static_cast<float>(sums.mass)) -
                      logf(static_cast<float>(sums.score));
  if (!(draw.temperature > 0.0f)) return {best.key, best.key + shift, best.token};

  Best drawn = others;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Scored& own = scored[i];
    const float logit = own.logit >= threshold ? own.score + shift : own.logit;
    drawn = drawn.merged({draw.key(logit, own.token), logit, own.token});
  }
  return merged_in_block(drawn, &shared.best[0][0]);
}

template <bool CONTRAST>
__device__ __forceinline__ void finish_row(const HeadTask& task, Shared& shared, int row) {
  const Partial all = merged_partials(task, shared, row);
  const Best chosen =
      CONTRAST ? contrast_best(task, shared, row, all.softmax.top, all.best) : all.best;
  if (threadIdx.x != 0) return;
  // A row of NaN has no best token; its log-probability is NaN, its token stays a legal one.
  task.tokens[row] = min(chosen.token, task.weight.count - 1);
  task.log_probs[row] = chosen.value - (all.softmax.top + logf(all.softmax.total));
}

}  // namespace multiexit::cuda
