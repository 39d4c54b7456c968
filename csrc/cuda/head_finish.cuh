// The last half, by the block that finishes last: from the results of all blocks to one token and
// its log-probability.
#pragma once
#include "cuda/head_task.cuh"

namespace multiexit::cuda {

// By one thread for each row: the block's statistics, its warps in order.
__device__ __forceinline__ void publish_partial(const HeadTask& task, const Shared& shared,
                                                int row) {
  Partial partial = shared.partials[0][row];
  for (int warp = 1; warp < kWarps; ++warp) partial = partial.merged(shared.partials[warp][row]);
  task.partials[static_cast<int64_t>(row) * gridDim.x + blockIdx.x] = partial;
}

// Whether all other blocks have published what they found. The same for all threads.
__device__ __forceinline__ bool finishes_last(const HeadTask& task, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // One thread's fences stand for the block's: the barriers around them do the rest.
    __threadfence();
    shared.is_last = atomicAdd(&task.kept->blocks_done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return shared.is_last;
}

// The tokens of all blocks that may be plausible. The first of each thread is asked for before it
// is known whether it is one.
struct ScoredTokens {
  const Scored* tokens;
  Scored first;
  int count;

  __device__ __forceinline__ ScoredTokens(const HeadTask& task, int row)
      : tokens(task.scored + static_cast<int64_t>(row) * task.weight.count),
        first(tokens[min(static_cast<int>(threadIdx.x), task.weight.count - 1)]),
        count(static_cast<int>(*static_cast<volatile uint32_t*>(&task.kept->scored[row]))) {}

  template <class Visit>
  __device__ __forceinline__ void each(Visit&& visit) const {
    if (static_cast<int>(threadIdx.x) < count) visit(first);
    for (int i = threadIdx.x + kThreads; i < count; i += kThreads) visit(tokens[i]);
  }
};

__device__ __forceinline__ Partial merged_partials(const HeadTask& task, Shared& shared, int row) {
  Partial own = {Softmax::none(), Best::none()};
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads)
    own = own.merged(task.partials[static_cast<int64_t>(row) * gridDim.x + block]);
  return merged_in_block(own, &shared.partials[0][0]);
}

// The best of the scored tokens, with the final threshold, and of the tokens below it.
//
// With the largest logit known, every scored token is either plausible or not; plausible ones share
// their mass in proportion to exp(score).
__device__ __forceinline__ Best contrast_best(const HeadTask& task, Shared& shared, int row,
                                              const ScoredTokens& scored, float top,
                                              const Best& others) {
  const float threshold = top + task.log_alpha(row);
  const Draw draw = task.draw(row);
  Best best = Best::none();
  scored.each([&](const Scored& own) {
    if (own.logit >= threshold) best = best.merged({own.score, own.score, own.token});
  });
  best = merged_in_block(best, shared.bests);

  Sums sums = {0, 0, 0};
  scored.each([&](const Scored& own) {
    if (own.logit >= threshold)
      sums = sums.merged(
          {Sums::units(expf(own.logit - top)), Sums::units(expf(own.score - best.key)), 1});
  });
  sums = merged_in_block(sums, shared.sums);
  if (task.num_candidates && threadIdx.x == 0)
    task.num_candidates[row] = static_cast<int>(sums.count);
  // What turns the score of a plausible token into a logit of the contrasted distribution.
  const float shift = top - best.key + logf(static_cast<float>(sums.mass)) -
                      logf(static_cast<float>(sums.score));
  if (!(draw.temperature > 0.0f)) return {best.key, best.key + shift, best.token};

  Best drawn = others;
  scored.each([&](const Scored& own) {
    const float logit = own.logit >= threshold ? own.score + shift : own.logit;
    drawn = drawn.merged({draw.key(logit, own.token), logit, own.token});
  });
  return merged_in_block(drawn, shared.bests);
}

template <bool CONTRAST>
__device__ __forceinline__ Best best_of_all(const HeadTask& task, Shared& shared, int row,
                                            Softmax& softmax) {
  if constexpr (CONTRAST) {
    const ScoredTokens scored(task, row);
    const Partial all = merged_partials(task, shared, row);
    softmax = all.softmax;
    return contrast_best(task, shared, row, scored, softmax.top, all.best);
  } else {
    const Partial all = merged_partials(task, shared, row);
    softmax = all.softmax;
    return all.best;
  }
}

template <bool CONTRAST>
__device__ __forceinline__ void finish_row(const HeadTask& task, Shared& shared, int row) {
  Softmax softmax;
  const Best chosen = best_of_all<CONTRAST>(task, shared, row, softmax);
  if (threadIdx.x != 0) return;
  // A row of NaN has no best token; its log-probability is NaN, its token stays a legal one.
  task.tokens[row] = min(chosen.token, task.weight.count - 1);
  task.log_probs[row] = chosen.value - (softmax.top + logf(softmax.total));
}

}  // namespace multiexit::cuda
