// One launch of the persistent decode kernel: its operands, its scratch, a block's share of each
// matrix, and its shared memory.
#pragma once
#include "cuda/calls.h"
#include "cuda/layers_call.h"
#include "cuda/grid_barrier.cuh"
#include "cuda/partials.cuh"
#include "cuda/ring.cuh"

namespace multiexit::cuda {

constexpr int kMatrices = 4;  // of a layer, in the order in which they are multiplied
enum MatrixName { kQkv, kAttended, kUp, kDown };

constexpr int kPartKeys = 256;  // least keys of a part of a sequence
constexpr int kMostParts = 16;  // of a sequence; beyond 4096 keys parts grow

// The shape of one of a layer's matrices. Its rows are multiplied in groups of four, each cut into
// `splits` parts, by the matrix alone: warps of a block take parts, whose sums are added in order.
struct Matrix {
  int rows, row_bytes;
  int half;  // 0, or the distance of two rows whose results meet, both of which are in a group
  int splits, split_bytes;
  int piece;  // bytes of a row that a slot of a ring holds

  __host__ __device__ __forceinline__ int groups() const { return rows / kGroup; }

  // The row that is the `member`-th of a group. Of rows that meet, i and i + half, i + 1 and
  // i + 1 + half are members 0 and 2, 1 and 3; members 0 and 2 of others do not meet.
  __device__ __forceinline__ int row(int group, int member) const {
    return first_row(group) + rows_on(member);
  }
  __device__ __forceinline__ int first_row(int group) const {
    if (!half) return group * kGroup;
    const int first = group * (kGroup / 2);
    return first / half * 2 * half + first % half;
  }
  __device__ __forceinline__ int rows_on(int member) const {
    return member % 2 + member / 2 * (half ? half : 2);
  }
};

// Of a block: the first of its groups of rows, how many it has, and in how many parts.
struct GroupShare {
  int first, groups, units;

  static __device__ __forceinline__ GroupShare of_this_block(const Matrix& matrix) {
    const int64_t all = matrix.groups();
    const int first = static_cast<int>(all * blockIdx.x / gridDim.x);
    const int groups = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x) - first;
    return {first, groups, groups * matrix.splits};
  }
};

// Where the parts of a block's shared memory begin, behind LayersShared and the layers. The room
// holds the sums of a block's parts of a matrix, or what its warps found over some of the keys.
struct LayersMemory {
  int states, room, rings, end;
};

struct LayersTask {
  const MultiexitLayer* layers;  // [num_layers]
  const float* hidden;           // [rows, width]
  float* output;                 // [rows, width]: the stream between layers
  const int64_t* slots;          // [rows]
  const int64_t* positions;      // [rows]
  const int* contexts;           // [rows]
  const int* block_tables;       // [rows, table_stride]
  const void* cos;               // [positions, head_dim / 2], or null
  const void* sin;
  GridCounters* counters;
  const char* then;   // what is read behind the layers
  int64_t then_bytes;
  uint16_t* query;    // [rows, heads, head_dim]
  uint16_t* inner;    // [rows, down.row_bytes / 2]
  float* attended;    // [rows, heads, kMostParts, head_dim]: means of values over parts of the keys
  float2* attention;  // [rows, heads, kMostParts]: their largest scores (base 2) and sums
  Matrix matrices[kMatrices];
  LayersMemory memory;
  int num_layers, rows, width, heads, kv_heads, head_dim, block_size, table_stride;
  int activation, slot_bytes;
  bool is_gated, has_shift;

  __device__ __forceinline__ int query_width() const { return heads * head_dim; }
  __device__ __forceinline__ int kv_width() const { return kv_heads * head_dim; }
};

// What a block's shared memory begins with.
struct LayersShared {
  Transfers transfers[kWarps][Ring::kTransfers];
  GroupShare shares[kMatrices];
  int64_t slots[kMostRows], positions[kMostRows];
  int contexts[kMostRows];
  float sums[2][kWarps][kMostRows];
};

constexpr int kLayersSharedBytes = (sizeof(LayersShared) + 127) / 128 * 128;

}  // namespace multiexit::cuda
