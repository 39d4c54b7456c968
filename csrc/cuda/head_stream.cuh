// The streaming half: a block reads its share of the upper head once, for all rows.
#pragma once
#include "cuda/head_task.cuh"
#include "cuda/product.cuh"

namespace multiexit::cuda {

// What a lane makes of the logits of its row, one after the other.
template <class Number, bool CONTRAST>
struct Reader {
  const HeadTask& task;
  Shared& shared;
  const Share share;
  const int row;
  const Draw draw;
  const float log_alpha;
  Softmax softmax = Softmax::none();
  Best best = Best::none();

  __device__ __forceinline__ Reader(const HeadTask& task, Shared& shared, Share share, int row)
      : task(task),
        shared(shared),
        share(share),
        row(row),
        draw(task.draw(row)),
        log_alpha(CONTRAST ? task.log_alpha(row) : 0.0f) {}

  __device__ __forceinline__ void read(float logit, int token) {
    if (task.bias) logit += number_at<Number>(task.bias, token);
    softmax.add(logit);
    if (CONTRAST && lists(logit, token)) return;
    if (CONTRAST && draw.temperature == 0.0f) return;
    best = best.merged({draw.key(logit, token), logit, token});
  }

  // Whether the token goes to the list of those that may be plausible. The largest logit so far
  // can only be too small, so the list can only be too long.
  __device__ __forceinline__ bool lists(float logit, int token) {
    const float seen = from_ordered(*static_cast<volatile uint32_t*>(&shared.top[row]));
    if (!(logit >= seen + log_alpha) || logit == -infinity()) return false;
    atomicMax(&shared.top[row], ordered(logit));
    candidate(task, shared, share, row, atomicAdd(&shared.listed[row], 1)) = {logit, token};
    return true;
  }

  // The blocks tell each other their largest logits while weights are on their way, so that in the
  // end nobody waits to hear them: `done` of `all` groups of this warp have been read.
  __device__ __forceinline__ void trade_tops(int done, int all) {
    if (done == all / 2) atomicMax(&task.kept->top[row], shared.top[row]);
    if (done == all - 2)
      atomicMax(&shared.top[row], *static_cast<volatile uint32_t*>(&task.kept->top[row]));
  }
};

// `ahead` is behind the pieces that are already under way. Leaves each warp's statistics in shared
// memory.
template <class Number, int ROWS, bool CONTRAST>
__device__ __forceinline__ void stream_head(const HeadTask& task, Shared& shared, Ring& ring,
                                            const char* hidden, Share share, Place here,
                                            Place ahead) {
  constexpr int kEchoes = kLanes / (kGroup * ROWS);  // lanes that hold the same logit
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int member = lane / kEchoes / ROWS, row = lane / kEchoes % ROWS;
  const bool reads = lane % kEchoes == 0 && row < task.rows;
  const Rows& matrix = task.weight;
  Reader<Number, CONTRAST> reader(task, shared, share, row);
  float sums[kGroup * ROWS] = {};
  while (here.group < share.stop) {
    ring.wait(here.turn);
    const char* slot = ring.slot(here.turn.slot);
    multiply<Number, ROWS>(
        {slot, slot + task.piece, slot + 2 * task.piece, slot + 3 * task.piece},
        hidden + here.offset, matrix.bytes, min(task.piece, matrix.bytes - here.offset), sums);
    __syncwarp();
    if (ahead.group < share.stop) {
      ahead.fill(ring, matrix, task.piece);
      ahead.advance(matrix.bytes, task.piece, kWarps);
    } else {
      ring.fill_nothing();
    }
    if (here.ends_group(matrix.bytes, task.piece)) {
      const float logit = totals(sums);
      const int token = here.group * kGroup + member;
      if (reads && token < matrix.count) reader.read(logit, token);
      if (CONTRAST && reads && member == 0 && warp == 0)
        reader.trade_tops((here.group - share.first) / kWarps,
                          (share.stop - share.first) / kWarps);
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    }
    here.advance(matrix.bytes, task.piece, kWarps);
  }
#pragma unroll
  for (int mask = kLanes / kGroup; mask < kLanes; mask *= 2) {
    reader.softmax = reader.softmax.merged(from_lane_xor(reader.softmax, mask));
    reader.best = reader.best.merged(from_lane_xor(reader.best, mask));
  }
  if (reads && member == 0) shared.partials[warp][row] = {reader.softmax, reader.best};
}

}  // namespace multiexit::cuda
