// Attention among packed sequences, nothing cached and nothing hidden; see
// ops/packed_attention.py for the contract.
#pragma once
#include <cstdint>
#include <vector>

#include "types.h"

namespace multiexit::cpu {

// Rows of `stride` numbers, which begin with [heads, head_dim].
struct PackedRows {
  const void* data;
  int64_t stride;
};

// Rows of each sequence. A sequence without queries may have any number of keys.
struct PackedLens {
  std::vector<int64_t> queries, keys;
};

// out: [queries, heads, head_dim] of `dtype`. With a bias queries and keys are the same rows.
void packed_attention(int threads, const PackedRows& query, const PackedRows& key,
                      const PackedRows& value, DType dtype, const PackedLens& lens, int64_t heads,
                      int64_t head_dim, float scale, const DistanceBias& bias, void* out);

}  // namespace multiexit::cpu
