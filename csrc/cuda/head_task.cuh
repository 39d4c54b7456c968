// One launch of the head kernel: its operands, its scratch, and a block's share of the vocabulary.
#pragma once
#include "cuda/calls.h"
#include "cuda/partials.cuh"

namespace multiexit::cuda {

constexpr int kNear = 32;     // candidates of a block and row that stay in shared memory

// A token that may be plausible: found while the upper head is read.
struct Candidate {
  float logit;
  int token;
};

// A token that was plausible when its block had read its part, with its logit in the contrast.
struct Scored {
  float logit, score;
  int token;
};

struct Partial {
  Softmax softmax;
  Best best;

  __device__ __forceinline__ Partial merged(const Partial& other) const {
    return {softmax.merged(other.softmax), best.merged(other.best)};
  }
};

// Rows of bytes that lie one behind the other.
struct Rows {
  const char* data;
  int count, bytes;
};

// Where a warp stands on its way through a part of a matrix: a group of rows, of which `offset`
// bytes are done, and the slot that holds the next piece.
struct Place {
  int group, offset = 0;
  Turn turn = {};

  __device__ __forceinline__ bool ends_group(int row_bytes, int piece) const {
    return offset + piece >= row_bytes;
  }
  __device__ __forceinline__ void advance(int row_bytes, int piece, int next_group) {
    if (ends_group(row_bytes, piece)) {
      group += next_group;
      offset = 0;
    } else {
      offset += piece;
    }
    turn.advance();
  }
  __device__ __forceinline__ void fill(Ring& ring, const Rows& matrix, int piece) const {
    ring.fill(turn, min(piece, matrix.bytes - offset), [&](int member) -> const char* {
      const int row = group * kGroup + member;
      if (row >= matrix.count) return nullptr;
      return matrix.data + static_cast<int64_t>(row) * matrix.bytes + offset;
    });
  }
};

// All zero between launches, so that a replayed graph needs no node to fill it.
struct Kept {
  uint32_t top[kMostRows];  // the largest logit that some blocks have seen, see `ordered`
  uint32_t scored[kMostRows];
  uint32_t blocks_done;
};

struct HeadTask {
  Rows weight;
  const char* hidden;  // [rows, width]
  const void* bias;    // [vocab] or null
  const char* lower_weight;
  const char* lower_hidden;  // [rows, width]
  const float* alpha;        // [rows]
  const float* temperature;  // [rows]
  const int64_t* seeds;      // [rows]
  const int64_t* positions;  // [rows]
  int64_t* tokens;           // [rows]
  float* log_probs;          // [rows]
  int* num_candidates;       // [rows] or null
  Kept* kept;
  Partial* partials;      // [rows, blocks]
  Candidate* candidates;  // [rows, vocab], each block's from its first token on, see Shared::near
  Scored* scored;         // [rows, vocab], of all blocks
  int rows;
  int piece;  // bytes of a row that a slot of a ring holds

  // For a row that is not there, what harms nobody.
  __device__ __forceinline__ Draw draw(int row) const {
    if (row >= rows || !(temperature[row] > 0.0f)) return {0.0f, 0, 0};
    return {temperature[row], static_cast<uint64_t>(seeds[row]),
            static_cast<uint32_t>(positions[row] & 0x7fffffff)};
  }
  __device__ __forceinline__ float log_alpha(int row) const {
    return row < rows ? logf(fminf(fmaxf(alpha[row], 0.0f), 1.0f)) : 0.0f;
  }
};

// Groups of vocabulary rows from `first` to `stop`: as many for each block, give or take one.
struct Share {
  int first, stop;

  static __device__ __forceinline__ Share of_this_block(int vocab) {
    const int64_t groups = (vocab + kGroup - 1) / kGroup;
    return {static_cast<int>(groups * blockIdx.x / gridDim.x),
            static_cast<int>(groups * (blockIdx.x + 1) / gridDim.x)};
  }
  __device__ __forceinline__ int first_token() const { return first * kGroup; }
};

// A block's shared memory, in front of the hidden states and the rings.
struct Shared {
  Transfers transfers[kWarps][Ring::kTransfers];
  Partial partials[kWarps][kMostRows];
  Best bests[kWarps];
  Sums sums[kWarps];
  Candidate near[kMostRows][kNear];
  uint32_t top[kMostRows];  // of this block so far, see `ordered`
  int listed[kMostRows];    // candidates of this block
  bool is_last;
};

// A block's `index`-th candidate of a row.
__device__ __forceinline__ Candidate& candidate(const HeadTask& task, Shared& shared, Share share,
                                                int row, int index) {
  if (index < kNear) return shared.near[row][index];
  return task.candidates[static_cast<int64_t>(row) * task.weight.count + share.first_token() +
                         index];
}

constexpr int kSharedBytes = (sizeof(Shared) + 127) / 128 * 128;

constexpr int64_t shared_bytes(int rows, int row_bytes, int piece) {
  return kSharedBytes + static_cast<int64_t>(rows) * row_bytes +
         static_cast<int64_t>(kWarps) * kSlots * kGroup * piece;
}

}  // namespace multiexit::cuda
